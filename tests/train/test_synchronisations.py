"""The host waits for the device once in an optimiser step: counted over four steps, by dispatch and by method."""

from __future__ import annotations

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tunesmith
from tests.matrix.cells import OBJECTIVES
from tests.runs import recipe
from tunesmith.objectives import sft
from tunesmith.train import loop

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
"""Operators that bring a value to the host: item, bool, float, index by a mask, torch.equal."""
METHODS = ("tolist", "numpy", "cpu")
"""Methods that a CPU serves without an operator, and a GPU does not."""


class Counter(TorchDispatchMode):
    """Counts what waits for the device. Tensors made on the host by ``collate`` are not on the device, so its calls, and the
    step counters that torch's optimisers keep on the host, do not count."""

    def __init__(self):
        super().__init__()
        self.count, self.paused, self.where = 0, 0, []

    def note(self, what):
        if not self.paused:
            self.count += 1
            self.where.append(what + "".join(traceback.format_stack(limit=9)[:-2]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in WAITS:
            self.note(function._schema.name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def pause(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


def counted(made, out, patch):
    """Waits in each step of a run, and where they were."""
    counter, per_step, train_step = Counter(), [], loop.train_step

    def pausing(function):
        def call(*args, **kwargs):
            with counter.pause():
                return function(*args, **kwargs)

        return call

    def counting(name):
        method = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            counter.note(name)
            with counter.pause():
                return method(self, *args, **kwargs)

        return call

    def step(job, now):
        before = counter.count
        with counter, pytest.MonkeyPatch.context() as inside:
            inside.setattr(type(now), "micro_batches", pausing(type(now).micro_batches))
            inside.setattr(torch.optim.AdamW, "step", pausing(torch.optim.AdamW.step))
            inside.setattr(job.objective, "count", pausing(job.objective.count))
            for name in METHODS:
                inside.setattr(torch.Tensor, name, counting(name))
            record = train_step(job, now)
        per_step.append(counter.count - before)
        return record

    patch.setattr(loop, "train_step", step)
    tunesmith.train(made, out=out)
    return per_step, counter.where


@pytest.mark.parametrize("objective", ["sft", "cpt", "dpo", "kto", "grpo", "ppo", "reward", "classify", "tag", "qa"])
def test_one_wait_a_step(objective, tmp_path, monkeypatch):
    keys = OBJECTIVES[objective]
    made = recipe(tmp_path, objective=keys, adaptation={"type": "lora", "r": 4}, max_steps=4, micro_batch_tokens=40)
    per_step, where = counted(made, tmp_path / "run", monkeypatch)
    assert len(per_step) == 4
    assert max(per_step) <= 1, where
    assert sum(per_step) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_fine_tuning_waits_once_too(precision, tmp_path, monkeypatch):
    made = recipe(tmp_path, adaptation="full", max_steps=4, precision=precision)
    per_step, where = counted(made, tmp_path / "run", monkeypatch)
    assert max(per_step) <= 1, where


def test_a_metric_that_is_read_in_each_micro_batch_is_found(tmp_path, monkeypatch):
    loss = sft.Objective.loss

    def reads(self, model, batch):
        value, metrics = loss(self, model, batch)
        return value, {**metrics, "perplexity": (float(value.detach()), 1)}

    monkeypatch.setattr(sft.Objective, "loss", reads)
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4}, max_steps=4, micro_batch_tokens=40)
    per_step, _ = counted(made, tmp_path / "run", monkeypatch)
    assert min(per_step) > 1
