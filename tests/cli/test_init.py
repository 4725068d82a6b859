import importlib
import json

import pytest

from tests.matrix.cells import CELLS
from tunesmith import objectives, recipe
from tunesmith.cli import init
from tunesmith.cli.main import main
from tunesmith.data.read.source import open_source
from tunesmith.recipe import text as recipe_text

PAIRS = sorted({(cell.objective, cell.adaptation) for cell in CELLS})


@pytest.mark.parametrize(("objective", "adaptation"), PAIRS)
def test_the_recipe_written_is_the_one_of_the_defaults(objective, adaptation):
    text = init.recipe_text(objective, adaptation, "m", "x.json")
    raw, _ = recipe_text.read(text, "init")
    keys = {"type": objective, **objectives.module(objective).Objective.traits.starter_keys}
    expected = {"model": "m", "objective": keys, "adaptation": adaptation, "data": {"train": [{"path": "x.json"}]}}
    assert recipe.parse(raw) == recipe.parse(expected)


@pytest.mark.parametrize(("objective", "adaptation"), PAIRS)
def test_it_contains_every_key_even_if_commented_out(objective, adaptation):
    text = init.recipe_text(objective, adaptation, "m", "x.json")
    lines = [line.strip().removeprefix("# ").removeprefix("- ") for line in text.splitlines()]
    written = {line.partition(":")[0] for line in lines if ":" in line}
    built = recipe.parse(recipe_text.read(text, "init")[0])
    parts = (
        built,
        built.objective,
        built.adaptation,
        built.data,
        built.data.train[0],
        built.data.eval,
        built.train,
        built.samples,
    )
    assert {key for part in parts for key in type(part).model_fields} <= written


def test_the_file_passes_the_check_of_a_recipe(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    assert main(["init", "sft", "--out", str(path), "--model", "here: there", "--data", "a #b.json"]) == 0
    assert capsys.readouterr().out == ""
    built = recipe.load(path)
    assert (built.model, built.data.train[0].path) == ("here: there", "a #b.json")


@pytest.mark.parametrize("objective", objectives.names())
def test_without_a_file_it_learns_from_rows_of_its_kind(objective, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("tunesmith.synth.python.draw"), "AHEAD", 3)  # read one module
    assert main(["init", objective]) == 0
    built = recipe.parse(recipe_text.read(capsys.readouterr().out, "init")[0])
    opened = open_source(built.data.train[0].model_copy(update={"limit": 3}), objectives.module(objective).Objective.traits.rows)
    assert len(list(opened.rows())) == 3


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    assert main(["init", "sft", "--out", str(path)]) == 2
    assert path.read_text() == "mine"


def test_unknown_objective_names_the_nearest(capsys):
    assert main(["init", "sfd"]) == 2
    assert "Did you mean `sft`?" in capsys.readouterr().err


def test_json(capsys):
    assert main(["init", "sft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"].startswith("# sft with lora")
