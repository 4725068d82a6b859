"""What holds for every objective of the matrix: its update depends on no split, layout or number of processes, and a run that was
killed goes on bit for bit. A new objective is its row in ``tests/matrix/cells.py`` and ``tests/runs.py``."""

import pytest

import tunesmith
from tests.matrix.cells import OBJECTIVES
from tests.numeric.test_invariance import SPLITS, in_two_processes, same_run
from tests.runs import apart, history, killed_before, recipe, weights
from tunesmith import objectives


def made_of(objective, folder, **train):
    """A run that evaluates on its own rows."""
    made = recipe(
        folder, "llama", OBJECTIVES[objective], {"type": "lora", "r": 4}, learning_rate=1e-3, optim_args={"eps": 1e-3}, **train
    )
    made["data"]["eval"] = {"path": str(folder / "rows.jsonl")}
    return made


def traits_of(objective):
    return objectives.module(objective).Objective.traits


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_split_makes_the_same_update_and_evaluation(objective, tmp_path):
    made = made_of(objective, tmp_path, eval_steps=2)
    whole = tunesmith.train(made, out=tmp_path / "whole")
    figure, _ = traits_of(objective).best
    for number, split in enumerate(SPLITS):
        other = tunesmith.train({**made, "train": {**made["train"], **split}}, out=tmp_path / str(number))
        assert apart(weights(whole["model_dir"]), weights(other["model_dir"])) <= 1e-6, split
        for name in (f"{figure}_before", figure):
            assert other[name] == pytest.approx(whole[name], abs=1e-6), split
    if not traits_of(objective).samples:  # a few sampled answers may be the same after a small update
        assert whole[figure] != whole[f"{figure}_before"]


def test_two_processes_make_the_update_of_one(tmp_path):
    runs = {}
    for objective in OBJECTIVES:
        (tmp_path / objective).mkdir()
        made = made_of(objective, tmp_path / objective, eval_steps=2)
        tunesmith.train(made, out=tmp_path / objective / "one")
        runs[objective] = (made, tmp_path / objective / "two")
    in_two_processes(list(runs.values()))
    for objective in OBJECTIVES:
        same_run(tmp_path / objective / "one", tmp_path / objective / "two", traits_of(objective).best[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_goes_on_bit_for_bit(objective, tmp_path):
    made = made_of(objective, tmp_path, max_steps=6, save_steps=2, eval_steps=3, logging_steps=3)
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(5, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    assert apart(weights(tmp_path / "killed" / "model"), weights(tmp_path / "straight" / "model")) == 0
