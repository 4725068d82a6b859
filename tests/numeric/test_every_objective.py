"""What holds for every objective of the matrix: its update depends on no split, layout or number of processes, and a run that was
killed goes on bit for bit. A new objective is its row in ``tests/matrix/cells.py`` and ``tests/runs.py``."""

from functools import cache
from itertools import product

import pytest

import tunesmith
from tests.matrix.cells import OBJECTIVES
from tests.numeric.test_invariance import (
    ADAPTATIONS,
    DRAWN_AND_RECOMPUTED,
    OTHERS,
    SPLITS,
    assert_no_split_matters,
    in_two_processes,
    same_run,
)
from tests.runs import apart, history, killed_before, recipe, weights
from tests.shortened import shortened
from tunesmith import objectives

WINDOWED = {"qa": {"type": "qa", "window": 32, "stride": 4, "max_answer_tokens": 6}}
"""Objectives whose rows become several windows."""
ADAPTED = {"sft": ADAPTATIONS["lora-dropout"], "cpt": "full", "classify": OTHERS["bottleneck"]}
"""Adaptations of the objectives; the others train a LoRA without dropout."""
DRAWN = {"sft": DRAWN_AND_RECOMPUTED}


def made_of(objective, folder, **train):
    """A run that evaluates on its own rows."""
    settings = {"learning_rate": 1e-3, "optim_args": {"eps": 1e-3}, **DRAWN.get(objective, {}), **train}
    of = WINDOWED.get(objective, OBJECTIVES[objective])
    made = recipe(folder, "llama", of, ADAPTED.get(objective, ADAPTATIONS["lora"]), **settings)
    made["data"]["eval"] = {"path": str(folder / "rows.jsonl")}
    return made


def traits_of(objective):
    return objectives.module(objective).Objective.traits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The straight run of each objective, trained once: (its recipe, its folder, its result). The log of step 3 spans a checkpoint."""

    @cache
    def trained(objective):
        folder = tmp_path_factory.mktemp(objective)
        made = made_of(objective, folder, eval_steps=2, save_steps=2, logging_steps=3)
        return made, folder, tunesmith.train(made, out=folder / "whole")

    return trained


BY_GRADIENTS = ("sft", "cpt", "classify", "tag", "qa", "dpo")
"""A step of these is its rows alone, so the gradients of its splits show all that whole runs would show, in a third of the time."""


@pytest.mark.parametrize("objective", BY_GRADIENTS)
def test_any_split_makes_the_same_gradients_and_evaluation(objective, tmp_path):
    assert_no_split_matters(made_of(objective, tmp_path), tmp_path)


BY_RUNS = ("sft", *(name for name in OBJECTIVES if name not in BY_GRADIENTS))
EXTREMES = (SPLITS[0], SPLITS[-1])


@pytest.mark.parametrize(
    ("objective", "splits"), shortened(product(BY_RUNS, (EXTREMES, SPLITS)), [*product(BY_RUNS, (EXTREMES,))])
)
def test_any_split_of_a_run_makes_the_same_update_and_evaluation(objective, splits, whole, tmp_path):
    made, _, straight = whole(objective)
    figure, _ = traits_of(objective).best
    for number, split in enumerate(splits):
        other = tunesmith.train({**made, "train": {**made["train"], **split}}, out=tmp_path / str(number))
        assert apart(weights(straight["model_dir"]), weights(other["model_dir"])) <= 1e-6, split
        for name in (f"{figure}_before", figure):
            assert other[name] == pytest.approx(straight[name], abs=1e-6), split
    if not traits_of(objective).samples:  # a few sampled answers may be the same after a small update
        assert straight[figure] != straight[f"{figure}_before"]


def test_two_processes_make_the_update_of_one(whole, tmp_path):
    in_two_processes([(whole(objective)[0], tmp_path / objective) for objective in OBJECTIVES])
    for objective in OBJECTIVES:
        same_run(whole(objective)[1] / "whole", tmp_path / objective, traits_of(objective).best[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_goes_on_bit_for_bit(objective, whole, tmp_path):
    """Killed in step 4, it goes on from the checkpoint of step 2, in the middle of the log of step 3."""
    made, straight, _ = whole(objective)
    killed_before(4, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(straight / "whole")
    assert apart(weights(tmp_path / "killed" / "model"), weights(straight / "whole" / "model")) == 0
