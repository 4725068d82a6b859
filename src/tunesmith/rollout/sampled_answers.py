"""The answers of one iteration: what was sampled, how it is scored, and how a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.batch.step import Examples
from tunesmith.data.encode import prompt_examples
from tunesmith.json_types import JsonObject
from tunesmith.models.generate.running_rows import Request
from tunesmith.rollout.reward_config import Completion
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.session_protocol import Session

if TYPE_CHECKING:
    import torch


TOTAL = "reward"
"""Name of the weighted sum of all rewards."""


@dataclass
class SampledAnswer:
    """One answer of the policy. ``place``: number of its prompt in the order of prompts. ``row``: index of
    the prompt among the training examples. ``ids`` include the stop token that ended it, ``text`` does not.

    ``logprobs`` float32 (tokens,): log-probabilities under the sampling rule, from the engine; empty where
    the rule excludes tokens. ``fingerprint``: hash of the weights that sampled it.
    """

    place: int
    sample: int
    row: int
    prompt_ids: np.ndarray
    ids: np.ndarray
    text: str
    reason: str
    logprobs: np.ndarray
    fingerprint: str
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each reward, by its name, and their weighted sum ``reward``; empty until it is scored."""
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays (tokens,) that training needs: ``old_logps``, ``advantages`` and what the objective adds."""

    @property
    def reward(self) -> float:
        return self.scores[TOTAL]

    @property
    def name(self) -> str:
        return f"rollout:{self.place}:{self.sample}"

    @property
    def stopped(self) -> bool:
        """The answer ended by itself, not at ``max_new_tokens``."""
        return self.reason in ("stop", "stop_string")

    @property
    def ends_with_stop(self) -> bool:
        """``ids`` end with a stop token."""
        return self.reason == "stop"

    def example(self) -> Example:
        """The answer after its prompt, with the arrays of its tokens."""
        ids = np.concatenate([self.prompt_ids, self.ids]).astype(np.int32)
        supervised = np.arange(len(ids)) >= len(self.prompt_ids)
        return {"input_ids": ids, "supervised": supervised, **self.tokens}


def mismatch(answers: Sequence[SampledAnswer]) -> JsonObject:
    """Return the largest difference between log-probabilities of the engine and of the training forward."""
    pairs = [(one.logprobs, one.tokens["old_logps"]) for one in answers if len(one.logprobs)]
    if not pairs:
        return {}
    return {"sampler_mismatch": max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)}


FACTS = ("place", "sample", "row", "text", "reason", "fingerprint", "scores")
"""Fields that a checkpoint keeps as JSON; the others are arrays."""


def state(answers: Sequence[SampledAnswer]) -> tuple[dict[str, torch.Tensor], list[JsonObject]]:
    """(tensors by name, the facts of each answer), for a checkpoint. Arrays of all answers are joined."""
    import torch

    joined: dict[str, list[np.ndarray]] = {}
    facts = []
    for answer in answers:
        arrays = {name: vars(answer)[name] for name in ("prompt_ids", "ids", "logprobs")}
        arrays |= {f"tokens.{name}": values for name, values in answer.tokens.items()}
        for name, values in arrays.items():
            joined.setdefault(name, []).append(values)
        lengths = {name: len(values) for name, values in arrays.items()}
        facts.append({**{name: vars(answer)[name] for name in FACTS}, "lengths": lengths})
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in joined.items()}, facts


def load(tensors: Mapping[str, torch.Tensor], facts: Sequence[JsonObject]) -> list[SampledAnswer]:
    """Return the answers of a ``state``."""
    done = dict.fromkeys(tensors, 0)
    answers = []
    for fact in facts:
        arrays: dict[str, np.ndarray] = {}
        for name, length in fact["lengths"].items():
            arrays[name] = tensors[name][done[name] : done[name] + length].numpy().copy()
            done[name] += length
        prompt_ids, ids, logprobs = (arrays.pop(name) for name in ("prompt_ids", "ids", "logprobs"))
        tokens = {name.removeprefix("tokens."): values for name, values in arrays.items()}
        known = {name: fact[name] for name in FACTS}
        answers.append(
            SampledAnswer(prompt_ids=prompt_ids, ids=ids, logprobs=logprobs, tokens=tokens, **known)
        )
    return answers


def sample(run: Session, requests: Sequence[Request], rows: Sequence[int]) -> list[SampledAnswer]:
    """Sample the answers to ``requests``, whose prompts are the examples ``rows``."""
    answers = []
    for request, row, one in zip(requests, rows, run.sample(requests), strict=True):
        # under a rule that excludes tokens, the others are likelier than in a forward pass
        logprobs = [] if request.params.filters else one.rule_logprobs
        answers.append(SampledAnswer(
            one.prompt, one.sample, row, np.array(request.ids, np.int32), np.array(one.ids, np.int32), one.text,
            one.reason, np.array(logprobs, np.float32), one.fingerprint,
        ))  # fmt: skip
    return answers


def score(run: Session, rewards: Rewards, answers: Sequence[SampledAnswer], prompts: Examples) -> None:
    """Score ``answers`` to the examples ``prompts``. Raises RewardError in all processes."""
    completions = [
        Completion(
            prompt_examples.decode_row(prompts[one.row]),
            one.text,
            one.ids.tolist(),
            one.ends_with_stop,
            one.name,
        )
        for one in answers
    ]
    scored = run.once(lambda: rewards.score(completions))
    for number, answer in enumerate(answers):
        answer.scores = {name: float(values[number]) for name, values in scored.by_name.items()}
        answer.scores[TOTAL] = float(scored.total[number])
