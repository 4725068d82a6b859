"""Rows of a step, its split into micro-batches, and the steps at which evaluations and saves are due."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.step import groups_under
from tunesmith.data.store.epochs import epochs
from tunesmith.errors import RecipeError
from tunesmith.train import optimizers
from tunesmith.train.train_config import TrainConfig, due

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def laid_out(rows, batch_size, seed, shuffle, passes):
    """Return steps of so many rows, without reading an example."""
    data = SimpleNamespace(source=np.zeros(rows, np.int32), weights=np.ones(1))
    return epochs(data, None, batch_size, seed, shuffle, passes, None)


@given(LENGTHS, st.integers(1, 150), st.booleans())
def test_every_row_is_in_one_micro_batch_under_the_budget(lengths, budget, packed):
    groups = groups_under(lengths, budget, PACKED if packed else PADDED)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        tokens = sum(lengths[r] for r in group) if packed else max(lengths[r] for r in group) * len(group)
        assert tokens <= budget or len(group) == 1


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_each_epoch_sees_every_row_once(rows, batch_size, seed, shuffle):
    run = laid_out(rows, batch_size, seed, shuffle, 2)
    plan = run.plan
    assert plan.steps == 2 * math.ceil(rows / batch_size)
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
        assert sorted(int(row) for step in steps for row in run.rows(step)) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_alone():
    run, again, other = (laid_out(40, 8, seed, True, 2) for seed in (1, 1, 2))
    assert run.rows(3).tolist() == again.rows(3).tolist() != other.rows(3).tolist()
    assert run.rows(1).tolist() != run.rows(6).tolist()
    ordered = laid_out(40, 8, 1, False, 1)
    assert [row for step in range(1, 6) for row in ordered.rows(step)] == list(range(40))


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1.0, range(1, 21)), (7.0, [7, 14]), (0.25, [5, 10, 15, 20]), (0.001, range(1, 21)), ("epoch", [8, 16]), (None, [])],
)
def test_when_things_are_due(every, steps):
    assert [step for step in range(1, 21) if due(every, step, 20, 8)] == list(steps)


CLOSED_FORMS = {
    "constant": lambda done, steps: 1.0,
    "linear": lambda done, steps: 1 - done / steps,
    "cosine": lambda done, steps: 0.5 * (1 + math.cos(math.pi * done / steps)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (10, 4), (33, 5)])
def test_the_learning_rate_is_its_closed_form(name, steps, warmup):
    config = TrainConfig(lr_scheduler_type="constant_with_warmup" if name == "constant" else name, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = optimizers.schedule(optimizer, config, steps)
    for step in range(steps):
        expected = step / warmup if step < warmup else CLOSED_FORMS[name](step - warmup, steps - warmup)
        assert schedule.get_last_lr()[0] == pytest.approx(0.5 * expected)
        optimizer.step()
        schedule.step()
    if name != "constant":
        assert schedule.get_last_lr()[0] == pytest.approx(0.0)


NEEDS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def test_every_schedule_of_transformers_can_be_built():
    from transformers import SchedulerType

    for kind in SchedulerType:
        config = TrainConfig(lr_scheduler_type={"type": kind.value, **NEEDS.get(kind.value, {})}, warmup_steps=2)
        optimizers.schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), config, 10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_type": "lineer"}, "unknown schedule 'lineer'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": {"type": "linear", "nonsense": 1}}, "nonsense"),
        ({"warmup_steps": 10}, "the warm-up takes 10 steps and the whole run has 10"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, said):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(RecipeError, match=said):
        optimizers.schedule(optimizer, TrainConfig(**settings), 10)
