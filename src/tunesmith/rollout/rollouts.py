"""The ``data.batch.step.Source`` of a policy that learns from its own answers.

An iteration takes the next prompts, samples answers, scores them, measures their log-probabilities with the
forward pass of training, and yields its optimiser steps: ``update_epochs`` passes over mini-batches of
``train.batch_size`` answers. A checkpoint holds the answers of the iteration with all that was measured, and
``iteration_file`` holds them before the first update, so a resumed run samples nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Batch, Example, Listed, Plan, Step
from tunesmith.data.store.epoch_order import random_stream
from tunesmith.errors import RecipeError, StaleRolloutError
from tunesmith.json_types import JsonObject
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.heads.log_probs import log_probs
from tunesmith.rollout import answer_batch, iteration_file, rollout_warnings, sampled_answers
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.rollout_config import RolloutKeys
from tunesmith.rollout.sampled_answers import TOTAL, SampledAnswer
from tunesmith.rollout.session_protocol import Session

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MINI_BATCHES = 4
"""Purpose of the random stream that orders the answers of an iteration (see ``data.store.epoch_order``)."""


KEPT = (
    "iteration", "next_prompt", "replaced", "attempt", "is_complete", "is_stopped", "seconds", "history", "warned",
)  # fmt: skip
"""Attributes of :class:`Rollouts` that a checkpoint keeps as JSON."""


class Learner(Protocol):
    """The part of an objective that a rollout uses."""

    rewards: Rewards
    kl_key: str
    """The recipe's key that keeps the policy near its reference, for warnings."""

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch: ...

    def measure(self, model: PreTrainedModel, batch: Batch) -> Sequence[Mapping[str, np.ndarray]]:
        """Return arrays (tokens,) of each answer under the policy: ``old_logps``, ``entropies`` and others."""

    def is_useless(self, rewards: np.ndarray) -> np.ndarray | None:
        """bool (prompts,): the answers to the prompt, with ``rewards`` (prompts, K), teach nothing. None if the
        objective does not compare the answers to a prompt."""

    def finish(self, answers: Sequence[SampledAnswer]) -> JsonObject:
        """Add ``advantages`` to the tokens of each answer; return figures of the iteration."""

    def stops_iteration(self, step: Step) -> bool:
        """Return whether the other passes of the iteration are to be skipped; all processes agree. Called
        before each pass but the first, with its first ``step``."""

    def state(self) -> JsonObject:
        """Return what the learner keeps from one iteration to the next."""

    def load(self, state: Mapping[str, object]) -> None:
        """Restore a :meth:`state`."""


class Rollouts:
    """Iterations of sampling and training. Prompts come in the order of ``run.epochs``, epoch after epoch."""

    def __init__(
        self,
        run: Session,
        keys: RolloutKeys,
        learner: Learner,
        compares: bool = False,
        most_resamples: int = 0,
    ) -> None:
        """``compares``: measure ``reference_logps``, of the policy at step 0. ``most_resamples``: attempts of an
        iteration to replace prompts whose answers teach nothing."""
        self.run, self.keys, self.learner = run, keys, learner
        self.compares, self.most_resamples = compares, most_resamples
        rows = run.epochs
        self.mini_batch = rows.batch_size
        self.prompts = _prompts_of_iteration(keys, self.mini_batch)
        self.per_epoch = self.prompts * keys.num_generations // self.mini_batch
        self.per_iteration = self.per_epoch * keys.update_epochs
        count = len(rows.order(0))
        iterations = max(1, -int(-count * rows.passes // self.prompts))
        steps = rows.max_steps or iterations * self.per_iteration
        per_epoch = max(1, round(count / self.prompts)) * self.per_iteration
        self.plan = Plan(steps, per_epoch, self.per_iteration)
        self.params = keys.sampling(run.seed)
        self.iteration = -1
        """Number of the iteration that ``answers`` belong to, from 0."""
        self.answers: list[SampledAnswer] = []
        self.next_prompt = 0
        """Place of the next prompt in the order of prompts."""
        self.replaced: list[float] = []
        """Rewards of the answers that were replaced in this iteration."""
        self.attempt = 0
        """Attempts of this iteration so far to replace prompts whose answers teach nothing."""
        self.is_complete = False
        self.is_stopped = False
        """The other passes of the iteration are skipped."""
        self.seconds = {"rollout": 0.0, "scoring": 0.0, "logps": 0.0}
        self.history: list[dict[str, float]] = []
        """Figures of all iterations, for ``rollout_warnings``."""
        self.warned: list[str] = []
        """Warnings that were given."""

    # ------------------------------------------------------------------------------------------------ steps

    def steps(self, start: int) -> Iterator[Step]:
        self.learner.rewards.open(self.run)
        for number in range(start, self.plan.steps + 1):
            iteration, place = divmod(number - 1, self.per_iteration)
            if iteration != self.iteration:
                if place:
                    raise StaleRolloutError(
                        f"step {number} belongs to iteration {iteration + 1}, and the checkpoint holds the answers of "
                        f"iteration {self.iteration + 1}.\n  Start another run with --out DIR."
                    )
                self._begin(iteration)
            if not self.is_complete:
                self._complete(number)
            if place == 0:
                self._require_fresh(number)
            step = self._step(number, place)
            if place and place % self.per_epoch == 0 and not self.is_stopped:
                self.is_stopped = self.learner.stops_iteration(step)
            if not self.is_stopped:
                self._doing("update")
                yield step

    def _step(self, number: int, place: int) -> Step:
        epoch, batch = divmod(place, self.per_epoch)
        examples = answer_batch.with_prefixes([answer.example() for answer in self.answers])
        names = [answer.name for answer in self.answers]
        listed = Listed(examples, names, shares=True)
        return Step(number, listed, self._mini_batches(epoch)[batch], self.learner.collate)

    def _mini_batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of ``answers`` in each mini-batch of a pass. The answers to a prompt follow one another, so
        that they share its forward pass (see ``data.batch.shared_prompts``)."""
        stream = random_stream(MINI_BATCHES, self.run.seed, self.iteration, epoch)
        order = stream.permutation(self.prompts * self.keys.num_generations)
        return [
            answer_batch.by_prompt(part, self.keys.num_generations)
            for part in np.split(order, self.per_epoch)
        ]

    def _require_fresh(self, number: int) -> None:
        """Raise StaleRolloutError unless the weights are those that sampled the answers."""
        now = self.run.fingerprint()
        for answer in self.answers:
            if answer.fingerprint != now:
                raise StaleRolloutError(
                    f"step {number}: {answer.name} was sampled by other weights ({answer.fingerprint}) than those of the "
                    f"policy ({now}), so its log-probabilities are not the policy's. No update was applied.\n"
                    "  This is a fault of tunesmith: report it. --resume samples the answers again."
                )

    # ------------------------------------------------------------------------------------------- iterations

    def _begin(self, iteration: int) -> None:
        self.iteration, self.answers, self.replaced, self.attempt = iteration, [], [], 0
        self.is_complete = self.is_stopped = False
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        if not self._restored():
            self._sample(self.prompts)

    def _complete(self, number: int) -> None:
        """Score the sampled answers, replace those that teach nothing, measure, and log the iteration."""
        while True:
            self._score()
            useless = self._useless()
            if useless is None or not useless.any() or self.attempt == self.most_resamples:
                break
            self.attempt += 1
            kept = np.repeat(~useless, self.keys.num_generations)
            self.replaced += [one.reward for one, keep in zip(self.answers, kept, strict=True) if not keep]
            self.answers = [one for one, keep in zip(self.answers, kept, strict=True) if keep]
            self._sample(int(useless.sum()))
        entropy = self._measure()
        figures = self.learner.finish(self.answers)
        self.is_complete = True
        record = self._record(number, entropy, figures)
        self.run.log(record)
        for line in self._new_warnings(record):
            self.run.log({"kind": "warning", "step": number, "warning": line})

    def _sample(self, prompts: int) -> None:
        """Sample the answers to the next prompts."""
        self._doing(f"sampling {prompts * self.keys.num_generations} answers")
        started = time.perf_counter()
        places = range(self.next_prompt, self.next_prompt + prompts)
        rows = {place: self._row(place) for place in places}
        prompt_ids = {place: self.run.epochs.data[row]["input_ids"] for place, row in rows.items()}
        requests = [
            Request(tuple(prompt_ids[place].tolist()), self.params, place, sample)
            for place in places
            for sample in range(self.keys.num_generations)
        ]
        self.answers += sampled_answers.sample(self.run, requests, [rows[one.prompt] for one in requests])
        self.next_prompt += prompts
        self.seconds["rollout"] += time.perf_counter() - started
        self._keep()

    def _keep(self) -> None:
        """Write the answers to a file: the next checkpoint may be many steps away."""
        if (folder := self.run.folder) is not None:
            self.run.once(lambda: iteration_file.save(folder, *self.state()))

    def _restored(self) -> bool:
        """Take the answers of this iteration from the file, if the weights of this moment sampled them."""
        folder = self.run.folder
        kept = None if folder is None else self.run.once(lambda: iteration_file.load(folder))
        if kept is None or kept[1]["iteration"] != self.iteration:
            return False
        now = self.run.fingerprint()
        if any(fact["fingerprint"] != now for fact in kept[1]["answers"]):
            return False
        self.load(*kept)
        return True

    def _row(self, place: int) -> int:
        """Return the index of the training example that is the prompt at this place."""
        epoch, index = divmod(place, len(self.run.epochs.order(0)))
        return int(self.run.epochs.order(epoch)[index])

    def _score(self) -> None:
        """Score the answers that have no score. One process does it, so rewards may be functions of anything."""
        unscored = [answer for answer in self.answers if not answer.scores]
        if not unscored:
            return
        self._doing(f"scoring {len(unscored)} answers")
        started = time.perf_counter()
        sampled_answers.score(self.run, self.learner.rewards, unscored, self.run.epochs.data)
        self.seconds["scoring"] += time.perf_counter() - started
        self._keep()

    def _useless(self) -> np.ndarray | None:
        return self.learner.is_useless(self._rewards())

    def _rewards(self) -> np.ndarray:
        """float64 (prompts, K)."""
        rewards = np.array([answer.reward for answer in self.answers], np.float64)
        return rewards.reshape(-1, self.keys.num_generations)

    def _measure(self) -> float:
        """Measure the tokens of all answers in the mini-batches of the first pass. Return the mean entropy."""
        self._doing("measuring log-probabilities")
        started = time.perf_counter()
        steps = [self._step(0, batch) for batch in range(self.per_epoch)]
        for step in steps:
            self._add(step, self.run.forward(self.learner.measure, step, as_trained=True))
        entropies = np.concatenate([answer.tokens.pop("entropies") for answer in self.answers])
        if self.compares:
            with self.run.reference():
                for step in steps:
                    self._add(step, self.run.forward(self._reference_logps, step, as_trained=True))
        self.seconds["logps"] += time.perf_counter() - started
        return float(entropies.mean(dtype=np.float64))

    def _reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[dict[str, np.ndarray]]:
        logps = log_probs(model, batch, self.keys.temperature)
        return [{"reference_logps": values} for values in answer_batch.by_answer(logps, batch)]

    def _add(self, step: Step, measured: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        for place, arrays in self.run.gather(list(measured.items())):
            self.answers[int(step.rows[place])].tokens |= arrays

    def _record(self, number: int, entropy: float, figures: JsonObject) -> JsonObject:
        """Return the iteration's record. Its step is the first of the iteration, so that a run which resumes
        before that step drops it."""
        rewards = self._rewards()
        everything = np.concatenate([rewards.ravel(), self.replaced])
        useless = self._useless()
        replaced = len(self.replaced) // self.keys.num_generations
        lengths = np.array([len(answer.ids) for answer in self.answers])
        names = [name for name in self.answers[0].scores if name != TOTAL]
        return {
            "kind": "rollout",
            "step": number,
            "epoch": round(self.plan.epoch(number - 1), 6),
            "iteration": self.iteration + 1,
            TOTAL: float(everything.mean()),
            "reward_std": float(everything.std()),
            **{
                f"reward/{name}": float(np.mean([one.scores[name] for one in self.answers])) for name in names
            },
            "entropy": entropy,
            "response_length": float(lengths.mean()),
            "stopped": float(np.mean([answer.stopped for answer in self.answers])),
            **(
                {}
                if useless is None
                else {"zero_variance": (int(useless.sum()) + replaced) / (self.prompts + replaced)}
            ),
            **({"replaced": replaced} if self.most_resamples else {}),
            **sampled_answers.mismatch(self.answers),
            **figures,
            **{f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()},
            **{
                f"{phase}_tokens_per_second": float(lengths.sum()) / max(seconds, 1e-9)
                for phase, seconds in self.seconds.items()
            },
        }

    def _new_warnings(self, record: JsonObject) -> list[str]:
        """Return the warnings that hold after the iteration of ``record``, and held after none before."""
        error = record["reward_std"] / np.sqrt(len(self.answers))
        pairs = np.stack([self._rewards().ravel(), [len(answer.ids) for answer in self.answers]])
        (_, covariance), (_, variance) = np.cov(pairs, ddof=0)
        derived = {"reward_stderr": error, "length_covariance": covariance, "length_variance": variance}
        figures = {**record, **self.run.evaluation, **derived}
        names = [name for name in rollout_warnings.FIGURES if name in figures]
        self.history.append({name: float(figures[name]) for name in names})
        found = rollout_warnings.find(self.history, self.learner.kl_key)
        new = [line for name, line in found.items() if name not in self.warned]
        self.warned = sorted({*self.warned, *found})
        return new

    def _doing(self, activity: str) -> None:
        iterations = -(-self.plan.steps // self.per_iteration)
        self.run.doing(f"iteration {self.iteration + 1} of {iterations}: {activity}")

    # ------------------------------------------------------------------------------- the rest of the Source

    def preview(self, most: int) -> Sequence[Step]:
        """Prompts followed by as many tokens as an answer may have, without anything that is measured."""
        data, count = self.run.epochs.data, len(self.run.epochs.order(0))
        prompts = -(-self.mini_batch // self.keys.num_generations)
        longest = np.argsort(-data.lengths, kind="stable")[:prompts].tolist()
        chosen = [
            [self._row((number * prompts + index) % count) for index in range(prompts)]
            for number in range(min(most, self.per_epoch))
        ]
        if most > 1:
            chosen.append(np.resize(longest, prompts).tolist())
        return [self._previewed(number, rows) for number, rows in enumerate(chosen, 1)]

    def _previewed(self, number: int, prompts: Sequence[int]) -> Step:
        """The answers to a prompt differ: they are its tokens from another place on."""
        data = self.run.epochs.data
        rows = np.repeat(prompts, self.keys.num_generations)[: self.mini_batch].tolist()
        examples = []
        for place, row in enumerate(rows):
            prompt = data[row]["input_ids"]
            answer = np.resize(
                np.roll(prompt, -(place % self.keys.num_generations)), self.keys.max_new_tokens
            )
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            examples.append({"input_ids": ids, "supervised": np.arange(len(ids)) >= len(prompt)})
        listed = Listed(answer_batch.with_prefixes(examples), [data.where(row) for row in rows], shares=True)
        return Step(number, listed, np.arange(len(rows)), self.learner.collate)

    def distinct(self) -> None:
        return None

    def state(self) -> tuple[dict[str, torch.Tensor], JsonObject]:
        tensors, facts = sampled_answers.state(self.answers)
        kept = {name: vars(self)[name] for name in KEPT}
        others = {"learner": self.learner.state(), "evaluation": dict(self.run.evaluation)}
        return tensors, {**kept, **others, "answers": facts}

    def load(self, tensors: Mapping[str, torch.Tensor], state: JsonObject) -> None:
        if not state:  # a checkpoint without one
            return
        vars(self).update({name: state[name] for name in KEPT})
        self.answers = sampled_answers.load(tensors, state["answers"])
        self.learner.load(state["learner"])
        self.run.evaluation = state["evaluation"]


def _prompts_of_iteration(keys: RolloutKeys, mini_batch: int) -> int:
    """Return the prompts of an iteration. Raises RecipeError where its answers do not fill mini-batches."""
    answers = keys.num_generations
    if keys.rollout_batch_size is None:
        if mini_batch % answers:
            raise RecipeError(
                f"train.batch_size is {mini_batch} answers and objective.num_generations {answers}: a step would hold a part of "
                f"a prompt's answers.\n  Set train.batch_size to a multiple of {answers}, or set objective.rollout_batch_size."
            )
        return mini_batch // answers
    total = keys.rollout_batch_size * answers
    if total % mini_batch:
        raise RecipeError(
            f"an iteration has {total} answers (objective.rollout_batch_size {keys.rollout_batch_size} x "
            f"objective.num_generations {answers}), which steps of train.batch_size {mini_batch} answers do not divide.\n"
            f"  Set train.batch_size to {total} (one step an iteration) or to a divisor of it."
        )
    return keys.rollout_batch_size
