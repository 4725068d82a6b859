"""The sampling rule: which token follows, given logits and the tokens before.

Processors and filters have the definitions and the order of transformers' ``generate``. A token is drawn by
looking up one uniform number in the cumulative distribution, so a row's draws depend on its own numbers alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tunesmith.errors import SettingError
from tunesmith.models.fast import kernels

NUCLEUS = 256
"""Likeliest tokens that are sorted first for top_p; the whole vocabulary is sorted only if they do not suffice."""


@dataclass(frozen=True)
class SamplingParams:
    """Rule by which the tokens of an answer are chosen. The defaults filter and change nothing.

    ``temperature``: 0 is greedy. ``top_k``: draw only from this many likeliest tokens; 0 = all.
    ``top_p``: draw from the smallest set of tokens with this probability (Holtzman et al., arXiv:1904.09751).
    ``min_p``: least probability of a token, relative to the likeliest (Nguyen et al., arXiv:2407.01082).
    ``typical_p``: locally typical sampling (Meister et al., arXiv:2202.00666).
    ``repetition_penalty``: divides the logit of each token of prompt and answer (Keskar et al.,
    arXiv:1909.05858). ``presence_penalty`` and ``frequency_penalty`` are subtracted for tokens of the answer,
    once or as often as they occur. ``logit_bias``: token id -> number added to its logit. ``bad_words``: token
    sequences that never occur. ``min_new_tokens``: number of tokens before a stop token may be drawn.
    ``stop``: token ids that end an answer; None = those of the tokenizer, the generation config and the chat
    template. ``stop_strings``: texts that end an answer; they are not part of it.
    ``choices``: token sequences; the answer is one of them.
    ``top_logprobs``: number of likeliest tokens reported at each position.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: frozenset[int] | None = None
    stop_strings: tuple[str, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    top_logprobs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more"),
            ("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "0 or more"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("typical_p", self.typical_p, 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            (
                "presence_penalty",
                self.presence_penalty,
                math.isfinite(self.presence_penalty),
                "a finite number",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                math.isfinite(self.frequency_penalty),
                "a finite number",
            ),
            ("bad_words", self.bad_words, all(self.bad_words), "sequences of at least one token"),
            ("stop_strings", self.stop_strings, all(self.stop_strings), "texts that are not empty"),
            ("choices", self.choices, all(self.choices), "sequences of at least one token"),
            ("top_logprobs", self.top_logprobs, self.top_logprobs >= 0, "0 or more"),
        ]
        for name, value, valid, expected in checks:
            if not valid:
                raise SettingError(name, value, expected)

    @cached_property
    def rule(self) -> SamplingParams:
        """The parameters that choose a token: equal for rows that differ in length, seed and stop strings alone."""
        return replace(self, max_new_tokens=0, seed=0, stop_strings=())

    @property
    def reads_tokens(self) -> bool:
        """True if earlier tokens change the logits."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.bad_words or self.choices or self.min_new_tokens)

    @property
    def filters(self) -> bool:
        """True if some tokens can be excluded by their probability."""
        return bool(self.top_k or self.min_p or self.top_p < 1 or self.typical_p < 1)


@dataclass(frozen=True)
class Drawn:
    """The token of each row, (rows,), and its log-probabilities, fp32 (rows,).

    ``logprobs``: under the model as it is. ``rule_logprobs``: under the sampling rule; 0 when greedy.
    """

    tokens: Tensor
    logprobs: Tensor
    rule_logprobs: Tensor


def draw(
    logits: Tensor,
    params: SamplingParams,
    uniform: Tensor | None = None,
    prompts: Sequence[Sequence[int]] = (),
    answers: Sequence[Sequence[int]] = (),
    stop: frozenset[int] = frozenset(),
) -> Drawn:
    """Draw one token for each row of ``logits``, fp32 (rows, vocabulary), all under the rule ``params``.

    ``uniform``: fp64 (rows,) in [0, 1); unused when greedy. ``prompts`` and ``answers``: the earlier tokens
    of each row; read only if the rule reads tokens. ``stop``: ids that ``min_new_tokens`` excludes.
    """
    scores = process(logits, params, prompts, answers, stop)
    if params.temperature == 0:
        largest, normaliser = largest_and_logsumexp(logits)
        tokens = largest if scores is logits else scores.argmax(dim=-1)
        return Drawn(tokens, _at(logits, tokens) - normaliser, torch.zeros(len(logits), device=logits.device))
    assert uniform is not None
    by_kernel = kernels.available(scores) and scores.dtype is torch.float32 and params.typical_p == 1
    return (_draw_by_kernel if by_kernel else draw_by_torch)(logits, scores, params, uniform)


def _draw_by_kernel(logits: Tensor, scores: Tensor, params: SamplingParams, uniform: Tensor) -> Drawn:
    """Draw in one pass over each row: torch makes twenty, in fp64, which take longer than a decoding step."""
    logits, scores = logits.contiguous(), scores.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs, rule_logprobs = torch.empty(2, len(logits)).unbind(0)
    filters = float(params.temperature), float(params.top_p), float(params.min_p), params.top_k
    kernels.call(
        "draw_tokens", None, logits, scores, uniform, tokens, logprobs, rule_logprobs, *filters, *logits.shape
    )
    return Drawn(tokens, logprobs, rule_logprobs)


def draw_by_torch(logits: Tensor, scores: Tensor, params: SamplingParams, uniform: Tensor) -> Drawn:
    """Draw a token for each row of the processed ``scores``, on any device and with every filter."""
    probabilities = filtered(scores, params)
    cumulative = probabilities.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    picked = probabilities.gather(1, tokens[:, None])[:, 0] / cumulative[:, -1]
    return Drawn(tokens, _at(logits, tokens) - largest_and_logsumexp(logits)[1], picked.log().float())


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens[:, None])[:, 0]


def largest_and_logsumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first of the largest of each row, and log(sum(exp(row))), of fp32 (rows, vocabulary)."""
    if not (kernels.available(logits) and logits.is_contiguous() and logits.dtype is torch.float32):
        return logits.argmax(dim=-1), logits.logsumexp(dim=-1)
    largest, logsumexp = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    kernels.call("largest_and_logsumexp", None, logits, largest, logsumexp, *logits.shape)
    return largest, logsumexp


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities of the rule, fp64 (rows, vocabulary), 0 for what a filter excludes; not normalised.

    The order is temperature, top_k, top_p, min_p, typical_p. Each filter reads the result of the one before.
    """
    scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[:, -1:], -math.inf)
    probabilities = scores.softmax(dim=-1).double()
    if params.top_p < 1:
        probabilities = _keep_nucleus(probabilities, params.top_p)
    if params.min_p > 0:
        likeliest = probabilities.max(dim=-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < params.min_p * likeliest, 0)
    if params.typical_p < 1:
        probabilities = _keep_typical(probabilities, params.typical_p)
    return probabilities


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    for count in (min(NUCLEUS, probabilities.shape[-1]), probabilities.shape[-1]):
        ordered, order = probabilities.topk(count, dim=-1)
        cumulative = ordered.cumsum(dim=-1)
        if count == probabilities.shape[-1] or bool((cumulative[:, -1] >= top_p).all()):
            break
    beyond = cumulative - ordered >= top_p  # the likelier tokens already reach top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _keep_typical(probabilities: Tensor, typical_p: float) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, until they have the mass ``typical_p``."""
    normalised = probabilities / probabilities.sum(dim=-1, keepdim=True)
    information = -normalised.log()
    entropy = (normalised * information).nansum(dim=-1, keepdim=True)
    distance = (information - entropy).abs()
    _, order = distance.sort(dim=-1)
    ordered = normalised.gather(-1, order)
    beyond = ordered.cumsum(dim=-1) - ordered >= typical_p
    return probabilities.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)


def process(
    logits: Tensor,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    stop: frozenset[int],
) -> Tensor:
    """Apply bias, penalties, bad words, minimum length and choices to ``logits``, in transformers' order."""
    if not (params.reads_tokens or params.logit_bias):
        return logits
    scores = logits.clone()
    for token, bias in params.logit_bias.items():
        scores[:, token] += bias
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        _penalise(scores[row], params, prompt, answer)
        for *before, last in params.bad_words:
            if not before or list(answer[-len(before) :]) == before:
                scores[row, last] = -math.inf
        if len(answer) < params.min_new_tokens:
            scores[row, list(stop)] = -math.inf
        if params.choices:
            allowed = sorted(next_tokens(params.choices, answer, stop))
            kept = scores[row, allowed]
            scores[row] = -math.inf
            scores[row, allowed] = kept
    return scores


def _penalise(scores: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Lower the scores (vocabulary,) of tokens that occurred, in place."""
    if params.repetition_penalty != 1:
        seen = torch.tensor([*prompt, *answer], device=scores.device).unique()
        there = scores[seen]
        factor = params.repetition_penalty
        scores[seen] = torch.where(there < 0, there * factor, there / factor)
    if (params.presence_penalty or params.frequency_penalty) and answer:
        tokens, counts = torch.tensor(list(answer), device=scores.device).unique(return_counts=True)
        scores[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def next_tokens(
    choices: Sequence[Sequence[int]], answer: Sequence[int], stop: frozenset[int]
) -> frozenset[int]:
    """Return the tokens that may follow ``answer``, which must become one of ``choices`` and then stop."""
    length = len(answer)
    matching = [choice for choice in choices if list(choice[:length]) == list(answer)]
    following = {choice[length] for choice in matching if len(choice) > length}
    complete = any(len(choice) == length for choice in matching)
    return frozenset(following | (stop if complete else frozenset()))


def uniform_numbers(seed: int, prompt: int, sample: int, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1), fp64: a function of seed, prompt and sample alone."""
    name = f"{seed} {prompt}" if sample == 0 else f"{seed} {prompt} {sample}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
