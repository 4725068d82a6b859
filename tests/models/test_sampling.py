"""The sampling rule: draws follow the filtered softmax, and everything else equals transformers' processors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation import logits_process as theirs

from tunesmith.errors import UserError
from tunesmith.models.generate.sampling import SamplingParams, draw, filtered, next_tokens, process, uniform_numbers

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
VOCABULARY = 12


def random_logits(rows: int = 64, width: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("number", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.71, 2), (0.95, 3), (0.9999, 3)])
def test_a_token_is_looked_up_in_the_cumulative_distribution(number: float, token: int) -> None:
    drawn = draw(LOGITS, SamplingParams(temperature=1.0), torch.tensor([number], dtype=torch.float64))
    assert drawn.tokens.tolist() == [token]
    assert float(drawn.logprobs) == pytest.approx(float(drawn.rule_logprobs)) == pytest.approx(float(LOGITS[0, token]))


FILTERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"top_k": 3}, [theirs.TopKLogitsWarper(3)]),
    ({"top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
    ({"min_p": 0.2}, [theirs.MinPLogitsWarper(0.2)]),
    ({"typical_p": 0.6}, [theirs.TypicalLogitsWarper(0.6)]),
    ({"temperature": 0.6, "top_k": 5, "top_p": 0.9}, [
        theirs.TemperatureLogitsWarper(0.6), theirs.TopKLogitsWarper(5), theirs.TopPLogitsWarper(0.9)]),
    ({"temperature": 1.7, "top_k": 9, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9}, [
        theirs.TemperatureLogitsWarper(1.7), theirs.TopKLogitsWarper(9), theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(0.05), theirs.TypicalLogitsWarper(0.9)]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "warpers"), FILTERS, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_filters_are_those_of_transformers_in_their_order(keys: dict[str, Any], warpers: list[Any]) -> None:
    logits = random_logits()
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    ours = filtered(logits, SamplingParams(**{"temperature": 1.0, **keys}))
    normalised = ours / ours.sum(-1, keepdim=True)
    assert torch.allclose(normalised.float(), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("keys", [keys for keys, _ in FILTERS], ids="+".join)
def test_frequencies_follow_the_filtered_softmax(keys: dict[str, Any]) -> None:
    """Chi-square over a small vocabulary: a rule that draws otherwise is rejected."""
    params, count = SamplingParams(**{"temperature": 1.0, **keys}), 20_000
    logits = random_logits(1, 8)
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits.expand(count, -1), params, numbers).tokens
    counts = torch.bincount(tokens, minlength=8).double()
    probabilities = filtered(logits, params)[0]
    probabilities = probabilities / probabilities.sum()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    if int(possible.sum()) > 1:
        assert chisquare(counts[possible], count * probabilities[possible]).pvalue > 1e-3


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
