"""Micro-batches at the same time make the gradients and figures of micro-batches in turn, and the same bits each time."""

import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch

import tunesmith
from tests.numeric.test_invariance import built, gradients
from tests.runs import apart, recipe, weights
from tests.train.test_forward_batches import refused
from tunesmith.models import lanes
from tunesmith.train import evaluation, loop, memory_budget

CELLS = [
    ("llama", "sft", "full"),
    ("llama", "sft", {"type": "prefix", "num_virtual_tokens": 4}),
    ("llama", "dpo", "lora"),
    ("llama", "kto", "lora"),
    ("llama", "reward", "lora"),
    ("bert", "classify", "full"),
    ("bert", "tag", "lora"),
]


@pytest.fixture(autouse=True)
def two_lanes(monkeypatch):
    """Two cores, and no network too small for lanes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(lanes, "LEAST_TOKENS", 1)
    monkeypatch.setattr(lanes, "LEAST_WORK", 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch):
    """The threads that computed a loss."""
    seen = set()
    to_device = loop.to_device
    monkeypatch.setattr(loop, "to_device", lambda *given: seen.add(threading.get_ident()) or to_device(*given))
    return seen


@pytest.mark.parametrize(("name", "objective", "adaptation"), CELLS)
def test_gradients_and_evaluation_are_those_of_one_lane(name, objective, adaptation, tmp_path, threads):
    noise = {"neftune_noise_alpha": 5.0} if objective == "sft" else {}
    made = recipe(tmp_path, name, objective, adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3}, **noise)
    ready, job = built(made, tmp_path, "auto")
    assert job.layout.lanes == 2
    both, job.budget = job.layout, 1000
    for step in islice(job.source.steps(1), 2):
        threads.clear()
        found = gradients(job, step)
        assert threads and threading.get_ident() not in threads
        job.layout = replace(both, lanes=1)
        expected = gradients(job, step)
        norm = sum(float(value.double().square().sum()) for value in expected.values()) ** 0.5
        assert norm > 0 and apart(found, expected) <= 1e-5 * norm
        loop.train_step(job, step)
        job.layout = both
    of_two, _ = evaluation.measure(job.model, job.objective, ready.data.train, both, 1000, job.device)
    of_one, _ = evaluation.measure(job.model, job.objective, ready.data.train, replace(both, lanes=1), 1000, job.device)
    assert of_two == pytest.approx(of_one, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_has_the_same_bits_each_time(precision, tmp_path, threads):
    keys = {"batch_size": 6, "micro_batch_tokens": 200, "precision": precision, "neftune_noise_alpha": 5.0}
    made = recipe(tmp_path, "llama", "sft", "full", learning_rate=1e-3, **keys)
    first, second = (weights(tunesmith.train(made, out=tmp_path / name)["model_dir"]) for name in ("first", "second"))
    assert threads - {threading.get_ident()}
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_that_do_not_fit_at_the_same_time_run_in_turn(tmp_path):
    made = recipe(tmp_path, "llama", "sft", "lora", learning_rate=1e-3)
    _, job = built(made, tmp_path, "auto")
    step = next(job.source.steps(1))
    expected = gradients(job, step)
    loss, refusals, meeting = job.objective.loss, [], threading.Barrier(2, timeout=30)

    def limited(model, batch):
        if threading.current_thread() is not threading.main_thread():
            meeting.wait()
            refusals.append(batch["input_ids"].numel())
            raise refused()
        return loss(model, batch)

    job.objective.loss = limited
    micro = loop.micro_batches(job, step)
    total = float(sum(job.objective.count(one.batch) for one in micro))
    for _ in range(20):
        outcome = loop.accumulation(job)(job, step, micro, total, job.update.backward)
        if not isinstance(outcome, int):
            break
        micro = loop.halve(job, step, micro, outcome)
    found = {name: gradient.clone() for name, gradient in job.update.masters.gradients().items()}
    norm = sum(float(value.double().square().sum()) for value in expected.values()) ** 0.5
    assert refusals and apart(found, expected) <= 1e-5 * norm


def test_the_default_has_room_for_the_two_longest_rows(tmp_path):
    made = recipe(tmp_path, "llama", "sft", "lora", learning_rate=1e-3)
    _, job = built(made, tmp_path, "auto")
    job.budget, longest = 20, memory_budget.longest_row(job)
    assert longest > 20 and memory_budget.make_room_for_lanes(job) and job.budget == 2 * longest
    heaviest, places = memory_budget.heaviest_micro_batch(job.source.preview(10), job.budget, job.layout)
    assert longest < heaviest.tokens(places, job.layout) <= 2 * longest
    job.config, job.budget = job.config.model_copy(update={"micro_batch_tokens": 20}), 20
    assert not memory_budget.make_room_for_lanes(job) and job.budget == 20
