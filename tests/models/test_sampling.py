"""The sampling rule: draws follow the filtered softmax, and everything else equals transformers' processors."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation import logits_process as theirs

from tunesmith.errors import UserError
from tunesmith.models.fast import kernels
from tunesmith.models.generate.sampling import (
    SamplingParams,
    draw,
    draw_by_torch,
    filtered,
    largest_and_logsumexp,
    next_tokens,
    process,
    uniform_numbers,
)

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
VOCABULARY = 12


def random_logits(rows: int = 64, width: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("number", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.71, 2), (0.95, 3), (0.9999, 3)])
def test_a_token_is_looked_up_in_the_cumulative_distribution(number: float, token: int) -> None:
    drawn = draw(LOGITS, SamplingParams(temperature=1.0), torch.tensor([number], dtype=torch.float64))
    assert drawn.tokens.tolist() == [token]
    assert float(drawn.logprobs) == pytest.approx(float(drawn.rule_logprobs)) == pytest.approx(float(LOGITS[0, token]))


WARPERS: dict[str, tuple[float, Any]] = {  # in transformers' order
    "temperature": (1.7, theirs.TemperatureLogitsWarper),
    "top_k": (5, theirs.TopKLogitsWarper),
    "top_p": (0.8, theirs.TopPLogitsWarper),
    "min_p": (0.1, theirs.MinPLogitsWarper),
    "typical_p": (0.7, theirs.TypicalLogitsWarper),
}
COMBINATIONS = [names for count in range(1, 6) for names in combinations(WARPERS, count)]
FILTERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({name: WARPERS[name][0] for name in names}, [WARPERS[name][1](WARPERS[name][0]) for name in names]) for names in COMBINATIONS
]


@pytest.mark.parametrize(("keys", "warpers"), FILTERS, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_filters_are_those_of_transformers_in_their_order(keys: dict[str, Any], warpers: list[Any]) -> None:
    logits = random_logits()
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    ours = filtered(logits, SamplingParams(**{"temperature": 1.0, **keys}))
    normalised = ours / ours.sum(-1, keepdim=True)
    assert torch.allclose(normalised.float(), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(("keys", "warpers"), FILTERS, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_frequencies_follow_the_filtered_softmax_of_transformers(keys: dict[str, Any], warpers: list[Any]) -> None:
    """Chi-square over a small vocabulary: a rule that draws otherwise is rejected."""
    params, count = SamplingParams(**{"temperature": 1.0, **keys}), 20_000
    logits = random_logits(1, 8)
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits.expand(count, -1), params, numbers).tokens
    counts = torch.bincount(tokens, minlength=8).double()
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    probabilities = expected.double().softmax(-1)[0]
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    if int(possible.sum()) > 1:
        assert chisquare(counts[possible], count * probabilities[possible]).pvalue > 1e-3


RULES: list[dict[str, Any]] = [
    {}, {"temperature": 0.7}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 40}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.9},
    {"top_p": 0.999}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
    {"repetition_penalty": 1.5, "top_p": 0.5}, {"logit_bias": {3: -math.inf}},
]  # fmt: skip


@pytest.mark.skipif(not kernels.available(LOGITS), reason="no C passes here")
@pytest.mark.parametrize("shape", [(40, 1), (40, 7), (40, 513), (60, 5000)])
@pytest.mark.parametrize("keys", RULES, ids=str)
def test_draws_in_one_pass_are_those_of_torch(shape: tuple[int, int], keys: dict[str, Any]) -> None:
    """The same token by the same number, in all rows but a few whose number lies between two tokens."""
    params = SamplingParams(**{"temperature": 1.0, **keys})
    if any(token >= shape[1] for token in params.logit_bias):
        pytest.skip("no such token")
    generator = torch.Generator().manual_seed(shape[1])
    logits = 4 * torch.randn(shape, generator=generator)
    uniform = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    before = [[0]] * len(logits), [[0, 0]] * len(logits)
    drawn = draw(logits, params, uniform, *before)
    scores = process(logits, params, *before, frozenset())
    expected = draw_by_torch(logits, scores, params, uniform)
    same = drawn.tokens == expected.tokens
    assert int((~same).sum()) <= 1
    assert torch.allclose(drawn.logprobs[same], expected.logprobs[same], atol=1e-5)
    assert torch.allclose(drawn.rule_logprobs[same], expected.rule_logprobs[same], atol=1e-5)
    possible = filtered(scores, params).gather(1, drawn.tokens[:, None]) > 0
    assert bool(possible.all()) and bool(drawn.rule_logprobs.isfinite().all())
    alone = [draw(logits[row : row + 1], params, uniform[row : row + 1], [[0]], [[0, 0]]) for row in (0, len(logits) - 1)]
    assert [float(one.rule_logprobs) for one in alone] == drawn.rule_logprobs[[0, -1]].tolist()


@pytest.mark.skipif(not kernels.available(LOGITS), reason="no C passes here")
def test_tokens_as_likely_as_the_last_of_top_k_are_kept_and_top_p_keeps_the_first() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]).log().expand(4000, -1)
    numbers = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def drawn(**keys: Any) -> list[int]:
        tokens: list[int] = draw(logits, SamplingParams(temperature=1.0, **keys), numbers).tokens.unique().tolist()
        return tokens

    assert drawn(top_k=2) == [1, 2, 3] and drawn(top_p=0.5) == [1, 2] and drawn(top_p=0.7) == [1, 2, 3]
    assert drawn(min_p=0.3) == [1, 2, 3] and drawn(top_k=2, min_p=0.9) == [2] and drawn(top_k=9) == [0, 1, 2, 3, 4]


def test_top_p_is_exact_where_the_likeliest_256_tokens_do_not_suffice() -> None:
    flat = 0.01 * torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    ours = filtered(flat, SamplingParams(temperature=1.0, top_p=0.9))
    expected = theirs.TopPLogitsWarper(0.9)(None, flat).softmax(-1)
    assert torch.equal(ours > 0, expected > 0)


PROMPT, ANSWER = [1, 2, 3, 3], [4, 5, 4]
BAD = [[7], [5, 4, 6], [1, 8]]


@pytest.mark.parametrize(
    ("keys", "processor"),
    [
        ({"repetition_penalty": 1.3}, theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"bad_words": tuple(map(tuple, BAD))}, theirs.NoBadWordsLogitsProcessor(BAD)),
        ({"min_new_tokens": 4}, theirs.MinNewTokensLengthLogitsProcessor(4, 4, [9, 10], "cpu")),
        ({"logit_bias": {2: 5.0, 9: -4.0}}, theirs.SequenceBiasLogitsProcessor({(2,): 5.0, (9,): -4.0})),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_processors_are_those_of_transformers(keys: dict[str, Any], processor: Any) -> None:
    logits = random_logits(1)
    expected = processor(torch.tensor([PROMPT + ANSWER]), logits.clone())
    ours = process(logits, SamplingParams(**keys), [PROMPT], [ANSWER], frozenset({9, 10}))
    assert torch.allclose(ours, expected) and not torch.equal(ours, logits)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.zeros(1, VOCABULARY)
    ours = process(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [PROMPT], [ANSWER], frozenset())
    assert ours[0, 4] == -(0.5 + 2 * 0.25) and ours[0, 5] == -0.75 and ours[0, 3] == 0


def test_choices_leave_only_their_own_tokens_and_then_a_stop() -> None:
    choices = ((1, 2), (1, 2, 3), (4,))
    stop = frozenset({9})
    assert next_tokens(choices, [], stop) == {1, 4}
    assert next_tokens(choices, [1], stop) == {2}
    assert next_tokens(choices, [1, 2], stop) == {3, 9}
    scores = process(torch.zeros(1, VOCABULARY), SamplingParams(choices=choices), [[0]], [[1, 2]], stop)
    assert [token for token in range(VOCABULARY) if scores[0, token] > -math.inf] == [3, 9]


def test_numbers_of_the_prompts_and_samples_of_a_run_are_uniform_and_independent() -> None:
    """The first numbers of 4,000 answers, and the pairs of numbers at neighbouring positions."""
    numbers = torch.stack([uniform_numbers(7, prompt, sample, 2) for prompt in range(500) for sample in range(8)])
    assert chisquare(torch.bincount((numbers[:, 0] * 20).long(), minlength=20)).pvalue > 1e-3
    cells = (numbers * 5).long()
    assert chisquare(torch.bincount(cells[:, 0] * 5 + cells[:, 1], minlength=25)).pvalue > 1e-3
    between = cells[:-1, 0] * 5 + cells[1:, 0]  # two samples of one prompt, or the next prompt
    assert chisquare(torch.bincount(between, minlength=25)).pvalue > 1e-3


def test_numbers_depend_on_seed_prompt_and_sample_alone() -> None:
    first = uniform_numbers(1, 2, 3, 5)
    assert torch.equal(first, uniform_numbers(1, 2, 3, 9)[:5])
    assert not any(torch.equal(first, uniform_numbers(*key, 5)) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 0)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": -1}, {"min_p": 1.5}, {"typical_p": 0.0},
        {"repetition_penalty": 0.0}, {"stop_strings": ("",)}, {"bad_words": ((),)}, {"choices": ((),)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (9, 49152)])
def test_the_largest_and_the_normaliser_in_one_pass_are_those_of_torch(shape: tuple[int, int]) -> None:
    logits = 20 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logits[0] = logits[0, 0]  # several are the largest
    largest, logsumexp = largest_and_logsumexp(logits)
    assert largest.tolist() == [0, *logits[1:].argmax(dim=-1).tolist()]
    assert torch.allclose(logsumexp, logits.logsumexp(dim=-1), atol=1e-5)
