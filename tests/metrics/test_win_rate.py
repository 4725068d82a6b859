"""Win rates: plain, and between answers of equal length."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from tunesmith.metrics.win_rate import FEWEST, length_controlled, win_rate


def verdicts(seed, rows, quality, liking, longer_by=0.0):
    """A judge with a liking for length, in log-odds for each standard deviation of 20 words."""
    draw = np.random.default_rng(seed)
    longer = draw.normal(longer_by, 20, rows).round()
    wins = draw.random(rows) < expit(quality + liking * np.tanh(longer / longer.std()))
    return wins.astype(float), longer


def test_a_win_rate_counts_ties_as_half():
    found = win_rate([1, 1, 0, 0.5, 0.5, 1] * 2)
    assert found.value == pytest.approx(4 / 6) and found.low < 4 / 6 < found.high <= 1


def test_longer_answers_of_equal_quality_win_only_without_control():
    seen = 0
    for seed in range(8):
        wins, longer = verdicts(seed, 300, quality=0, liking=2, longer_by=15)
        found, sentence = length_controlled(wins, longer)
        assert win_rate(wins).low > 0.5 and "times the odds" in sentence
        seen += found.low <= 0.5 <= found.high
    assert seen >= 6


def test_a_better_system_wins_with_and_without_control():
    wins, longer = verdicts(0, 400, quality=1, liking=1)
    found, _ = length_controlled(wins, longer)
    assert found.value == pytest.approx(expit(1), abs=0.07) and found.low > 0.5


def test_length_that_explains_every_verdict_is_reported():
    longer = np.concatenate([np.arange(1, 21), -np.arange(1, 21)])
    found, sentence = length_controlled((longer > 0).astype(float), longer)
    assert found.value == pytest.approx(0.5, abs=0.01) and "length alone explains every verdict" in sentence


def test_a_system_that_always_wins_has_a_finite_rate():
    found, _ = length_controlled(np.ones(40), np.random.default_rng(0).normal(0, 9, 40))
    assert 0.9 < found.value < 1 and np.isfinite(found.low)


@pytest.mark.parametrize("rows, gap, words", [(FEWEST - 1, None, "at least 20"), (30, 4.0, "the same amount")])
def test_too_little_to_control(rows, gap, words):
    longer = np.arange(rows) if gap is None else np.full(rows, gap)
    found, sentence = length_controlled([1.0] * rows, longer)
    assert found is None and words in sentence
