"""A source whose rows come from the model itself, through the real loop: sampled, scored by a rule, two epochs of mini-batches."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import tunesmith
from tests.kill_points import in_fork
from tests.runs import apart, history, killed_before, recipe, weights
from tunesmith.data.batch.step import Listed, Plan, Step
from tunesmith.errors import NonFiniteError
from tunesmith.objectives import sft
from tunesmith.train import loop

PROMPTS, ANSWERS, ROWS, EPOCHS, ITERATIONS = 4, 2, 4, 2, 3
MINI_BATCHES = PROMPTS * ANSWERS // ROWS
PER_ITERATION = MINI_BATCHES * EPOCHS
STOPS_EARLY = 2
"""The iteration (from 1) that ends after its first epoch."""


@dataclass
class Rollouts:
    """Prompts -> answers -> scores -> steps. An answer is supervised as often as its score says: 0 or 1 times each token."""

    session: Any
    objective: Any
    stops_early: int = STOPS_EARLY
    iteration: int = 0
    examples: list[dict[str, np.ndarray]] = field(default_factory=list)
    plan: Plan = field(default_factory=lambda: Plan(ITERATIONS * PER_ITERATION, PER_ITERATION))

    def _prompt(self, number: int) -> np.ndarray:
        example = self.session.epochs.data[number % len(self.session.epochs.data)]
        return example["input_ids"][: max(2, int(np.flatnonzero(example["supervised"])[0]))]

    def _sample(self, iteration: int) -> None:
        prompts = [self._prompt(iteration * PROMPTS + place // ANSWERS) for place in range(PROMPTS * ANSWERS)]
        answers = self.session.generate([one.tolist() for one in prompts], 6, seed=self.session.seed + iteration)
        self.iteration, self.examples = iteration, []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.array([*prompt, *answer], np.int32)
            mask = np.zeros(len(ids), np.bool_)
            mask[len(prompt) :] = True
            if len(set(answer)) == 1:  # the rule: an answer that repeats itself earns its first token alone
                mask[len(prompt) + 1 :] = False
            self.examples.append({"input_ids": ids, "supervised": mask})

    def _step(self, number: int, place: int) -> Step:
        names = [f"rollout:{self.iteration * PROMPTS + one // ANSWERS}:{one % ANSWERS}" for one in range(len(self.examples))]
        first = place % MINI_BATCHES * ROWS
        return Step(number, Listed(self.examples, names), np.arange(first, first + ROWS), self.objective.collate)

    def steps(self, start):
        for number in range(start, self.plan.steps + 1):
            iteration, place = divmod(number - 1, PER_ITERATION)
            if iteration + 1 == self.stops_early and place >= MINI_BATCHES:
                continue
            if place == 0:
                self._sample(iteration)
            yield self._step(number, place)

    def preview(self, most):
        rows = range(len(self.session.epochs.data))
        examples = [self.session.epochs.data[row] for row in rows][:ROWS]
        return [Step(1, Listed(examples, ["preview"] * len(examples)), np.arange(len(examples)), self.objective.collate)]

    def distinct(self):
        return None

    def state(self):
        lengths = [len(one["input_ids"]) for one in self.examples]
        tensors = {
            name: torch.from_numpy(np.concatenate([one[name] for one in self.examples])) for name in ("input_ids", "supervised")
        }
        return tensors, {"iteration": self.iteration, "lengths": lengths}

    def load(self, tensors, state):
        self.iteration, ends = state["iteration"], np.cumsum(state["lengths"])[:-1]
        parts = {name: np.split(tensors[name].numpy(), ends) for name in ("input_ids", "supervised")}
        self.examples = [dict(zip(parts, arrays, strict=True)) for arrays in zip(*parts.values(), strict=True)]


def made(folder, **train):
    settings = {"max_steps": None, "logging_steps": 1, "save_steps": 1, "save_total_limit": 20, "learning_rate": 3e-3}
    return recipe(folder, count=12, **{**settings, **train})


@pytest.fixture
def sampling(monkeypatch):
    """Every sft run takes its steps from rollouts."""
    monkeypatch.setattr(sft.Objective, "source", lambda self, session: Rollouts(session, self))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Objective, "source", lambda self, session: Rollouts(session, self))
        tunesmith.train(made(folder), out=folder / "run")
    return folder


def steps_of(folder):
    return [record for record in history(folder) if record["kind"] == "train"]


def test_schedule_and_end_count_the_steps_of_the_plan(whole):
    records = steps_of(whole / "run")
    skipped = set(range(PER_ITERATION * (STOPS_EARLY - 1) + MINI_BATCHES + 1, PER_ITERATION * STOPS_EARLY + 1))
    assert [record["step"] for record in records] == [n for n in range(1, 13) if n not in skipped]
    for record in records:  # linear, from the first step to the last one of the plan
        assert record["learning_rate"] == pytest.approx(3e-3 * (1 - (record["step"] - 1) / 12))


def test_answers_are_sampled_anew_in_each_iteration(sampling, tmp_path):
    seen, train_step = [], loop.train_step

    def watched(job, step):
        seen.append([example["input_ids"].tolist() for example in step.examples()])
        return train_step(job, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        tunesmith.train(made(tmp_path), out=tmp_path / "run")
    assert seen[0] == seen[2] and seen[1] == seen[3], "two epochs of the same mini-batches"
    assert seen[0] != seen[4] and len(seen) == 10


def test_a_last_iteration_that_stops_early_ends_the_run_at_its_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(sft.Objective, "source", lambda self, session: Rollouts(session, self, stops_early=ITERATIONS))
    result = tunesmith.train(made(tmp_path), out=tmp_path / "run")
    assert result["steps"] == 12 and (tmp_path / "run" / "checkpoints" / "step-12").is_dir()
    assert steps_of(tmp_path / "run")[-1]["step"] == 10


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_killed_run_goes_on_in_the_middle_of_an_iteration(sampling, whole, tmp_path, step):
    killed_before(step, made(tmp_path), tmp_path / "run")
    tunesmith.train(made(tmp_path), out=tmp_path / "run", resume=True)
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "run" / "model")) == 0
    assert history(tmp_path / "run") == history(whole / "run")


def test_a_process_killed_in_the_middle_of_an_iteration_goes_on(sampling, whole, tmp_path, monkeypatch):
    """SIGKILL: nothing of the process is closed, flushed or caught."""
    train_step = loop.train_step

    def dies(job, step):
        if step.number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(job, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        ended = in_fork(lambda: tunesmith.train(made(tmp_path), out=tmp_path / "run"))
    assert ended == (-signal.SIGKILL, None)
    tunesmith.train(made(tmp_path), out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(whole / "run")
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "run" / "model")) == 0


def test_resuming_without_the_rollouts_would_be_seen(sampling, whole, tmp_path, monkeypatch):
    killed_before(6, made(tmp_path), tmp_path / "run")
    monkeypatch.setattr(Rollouts, "load", lambda self, tensors, state: self._sample(state["iteration"]))
    tunesmith.train(made(tmp_path), out=tmp_path / "run", resume=True)
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "run" / "model")) > 0


def test_memory_that_runs_out_halves_a_micro_batch_of_samples(sampling, whole, tmp_path, monkeypatch):
    loss, largest = sft.Objective.loss, []

    def limited(self, model, batch):
        largest.append(batch["input_ids"].numel())
        if torch.is_grad_enabled() and largest[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(self, model, batch)

    monkeypatch.setattr(sft.Objective, "loss", limited)
    tunesmith.train(made(tmp_path), out=tmp_path / "run")
    assert max(largest) > 60
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "run" / "model")) < 1e-5


def test_a_loss_that_is_not_finite_names_prompt_and_sample(sampling, tmp_path, monkeypatch):
    loss, marked = sft.Objective.loss, []

    def poisoned(self, model, batch):
        value, metrics = loss(self, model, batch)
        ids = batch["input_ids"].flatten().tolist()
        if marked and any(ids[at : at + len(marked[0])] == marked[0] for at in range(len(ids))):
            value = value * float("nan")
        return value, metrics

    sample = Rollouts._sample

    def marking(self, iteration):
        sample(self, iteration)
        if iteration == 1:
            marked.append(self.examples[3]["input_ids"].tolist())

    monkeypatch.setattr(Rollouts, "_sample", marking)
    monkeypatch.setattr(sft.Objective, "loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 5: .*\n  Rows: rollout:5:1\n"):
        tunesmith.train(made(tmp_path), out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()
