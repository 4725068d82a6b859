"""The recipes run as they stand: each for two steps, on a tiny model."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest

import tunesmith
from tests import processes
from tests.tiny import save_tiny
from tunesmith import objectives, recipe
from tunesmith.data.read import builtin
from tunesmith.pipeline import pipeline_file, run_stages

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PIPELINES = sorted(FOLDER.glob("*/pipeline.yaml"))


@pytest.fixture(scope="module", autouse=True)
def built_in_rows_are_made_once():
    """Recipes read 24 rows here. The first rows of a kind take most of a second, and a run reads them several times."""
    rows = builtin.rows
    first = functools.cache(lambda name: list(itertools.islice(rows(name), 60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "rows", lambda name: iter(first(name)))
        yield


@pytest.fixture
def run_all():
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=4096)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_with_no_file_but_the_model(path, run_all, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [*run_all.shortened(path, 1, str(model)), "data.train.0.limit=24", "train.max_length=400", *quick(recipe.load(path))]
    result = tunesmith.train(path, out="run", overrides=keys)
    best = objectives.module(result["objective"]).Objective.traits.best[0]
    assert result["steps"] == 1 and math.isfinite(result[best])


@pytest.fixture
def pipelines(run_all, model, tmp_path):
    """Read a pipeline for one step of each stage on the tiny model, into a new folder."""

    def read(path):
        stages = pipeline_file.read(path, tmp_path).stages
        tiny = ["data.train.0.limit=24", "train.max_length=400"]
        keys = [f"{stage.name}.{key}" for stage in stages for key in [*tiny, *quick(stage.recipe)]]
        return pipeline_file.read(path, tmp_path / "out", [*run_all.shortened(path, 1, str(model)), *keys])

    return read


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.parent.name)
def test_the_stages_of_every_pipeline_fit_each_other(path, pipelines):
    facts = run_stages.run_pipeline(pipelines(path), dry_run=True)
    assert {one["action"] for one in facts["plan"]} == {"train"}
    written = {one.name for one in path.parent.glob("*.yaml")} - {"pipeline.yaml"}
    assert {Path(stage.source).name for stage in pipelines(path).stages} == written, "every recipe of the folder is a stage"


@pytest.mark.long
@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.parent.name)
def test_every_pipeline_runs_with_no_file_but_the_model(path, pipelines):
    facts = run_stages.run_pipeline(pipelines(path))
    assert [one["steps"] for one in facts["stages"]] == [1] * len(facts["stages"])


def quick(chosen):
    """sft refuses longer rows unless told otherwise; tiny models have tiny vocabularies, so rows are long."""
    kind = chosen.resolved()["objective"]["type"]
    keys = ["objective.overlong=truncate"] if kind in ("sft", "classify") else []
    return [*keys, "data.max_unlearnable=1"] if kind in ("sft", "cpt") else keys


def test_a_recipe_is_shortened_in_nothing_but_its_length(run_all):
    for path in RECIPES:
        whole, short = recipe.load(path).resolved(), recipe.load(path, run_all.shortened(path, 3, None)).resolved()
        assert short["train"]["max_steps"] == 3
        for key in ("model", "objective", "adaptation", "seed"):
            assert whole[key] == short[key]
        assert whole["data"]["train"] == short["data"]["train"]


def test_a_failing_recipe_fails_the_script_and_prints_the_reason(run_all, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "subprocess", processes)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "sft-lora", "--steps", "1", "--model", str(tmp_path / "no-model")])
    assert run_all.main() == 1
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("sft-lora"))
    assert line.endswith("FAILED") and "no-model" in printed and "1 of 1 recipes failed" in printed


def test_an_unknown_recipe_is_an_error_that_lists_the_recipes(run_all, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "sft-nothing"])
    with pytest.raises(SystemExit):
        run_all.main()
    assert "sft-lora" in capsys.readouterr().err
