"""A forward-only batch above the memory limit is halved, with the same result."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tunesmith
from tests.runs import history, recipe
from tunesmith import machine
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.shared_prompts import Sizes
from tunesmith.errors import OutOfMemoryError
from tunesmith.models import forward_groups
from tunesmith.objectives import classify, sft

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """It takes a tenth of a second at each halving."""
    monkeypatch.setattr(machine, "release_memory", lambda device: None)


def refused():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def small_memory(monkeypatch, objective, most):
    """Let ``objective`` run out of memory above so many tokens. Returns a list that grows by the size of each batch."""
    evaluate, asked = objective.evaluate, []

    def limited(self, model, batch):
        asked.append(batch["input_ids"].numel())
        if asked[-1] > most:
            raise refused()
        return evaluate(self, model, batch)

    monkeypatch.setattr(objective, "evaluate", limited)
    return asked


def evaluated(folder):
    """Loss and perplexity of each evaluation."""
    return [(one["eval_loss"], one["perplexity"]) for one in history(folder) if one["kind"] == "eval"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    most=st.integers(30, 90),
    budget=st.integers(1, 300),
    packed=st.booleans(),
)
def test_every_row_comes_once(lengths, most, budget, packed):
    sizes, failed = np.array(lengths), []

    def run(places):
        size = sizes[places].sum() if packed else sizes[places].max() * len(places)
        if size > most:
            failed.append(size)
            raise refused()
        return {"places": places}

    layout = PACKED if packed else PADDED
    found = forward_groups.run_groups(run, Sizes(sizes, np.ones_like(sizes)), budget, layout, CPU, str)
    assert all(places == result["places"] for places, result in found)
    assert sorted(place for places, _ in found for place in places) == list(range(len(lengths)))
    assert failed == sorted(set(failed), reverse=True)  # each attempt is smaller than all that did not fit


def test_another_error_is_not_taken_for_memory():
    def run(places):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        forward_groups.run_groups(run, Sizes(np.array([3]), np.array([1])), 10, PACKED, CPU, str)


def test_an_evaluation_that_does_not_fit_is_done_in_halves(tmp_path, monkeypatch):
    made = recipe(tmp_path, count=24, eval_steps=2, micro_batch_tokens=2000)
    made["data"]["eval"] = {"fraction": 0.5}
    tunesmith.train(made, out=tmp_path / "whole")
    asked = small_memory(monkeypatch, sft.Objective, most=80)
    tunesmith.train(made, out=tmp_path / "halved")
    assert max(asked) > 80 and sum(size <= 80 for size in asked) > len(evaluated(tmp_path / "whole"))
    for ours, theirs in zip(evaluated(tmp_path / "halved"), evaluated(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_predictions_that_do_not_fit_are_made_in_halves(tmp_path, monkeypatch):
    found = tunesmith.train(recipe(tmp_path, objective="classify"), out=tmp_path / "run")
    whole = list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl"))
    asked = small_memory(monkeypatch, classify.Objective, most=40)
    halved = list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl"))
    assert max(asked) > 40 and len(halved) == len(whole) == 12
    for ours, theirs in zip(halved, whole, strict=True):
        assert ours["label"] == theirs["label"] and ours["row"] == theirs["row"]


def test_a_row_that_does_not_fit_is_named(tmp_path, monkeypatch):
    made = recipe(tmp_path, count=24, eval_steps=2)
    made["data"]["eval"] = {"fraction": 0.5}
    small_memory(monkeypatch, sft.Objective, most=3)
    with pytest.raises(OutOfMemoryError, match=r"evaluation of .*rows\.jsonl:\d+: this row alone \(\d+ tokens\)"):
        tunesmith.train(made, out=tmp_path / "run")
