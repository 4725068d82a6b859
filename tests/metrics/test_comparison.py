"""Intervals, p values and detectable differences of two systems on the same prompts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunesmith.metrics import comparison


def means(values):
    return np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)


def clustered(generator, groups=60, size=5, shift=0.0):
    """Rows of texts: half of the variance belongs to the text."""
    texts = generator.normal(size=groups).repeat(size)
    return texts + generator.normal(size=groups * size) + shift, np.arange(groups).repeat(size).tolist()


def covered(make, trials=1000):
    hits = 0
    for seed in range(trials):
        found = make(np.random.default_rng(seed))
        hits += found.low <= 0 <= found.high
    return hits / trials


def test_an_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).normal(3, 2, 50)
    found = comparison.interval(means(values))
    expected = stats.t.interval(0.95, 49, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)


def test_intervals_of_independent_rows_cover_the_truth():
    assert 0.93 <= covered(lambda draw: comparison.interval(means(draw.normal(size=80)))) <= 0.97


def test_intervals_of_clustered_rows_cover_the_truth():
    def made(draw, clusters=True):
        values, texts = clustered(draw)
        return comparison.interval(means(values), texts if clusters else None)

    assert 0.93 <= covered(made) <= 0.97
    assert covered(lambda draw: made(draw, clusters=False), trials=200) < 0.85, "rows of a text are not independent"


def test_intervals_of_differences_of_clustered_rows_cover_the_truth(monkeypatch):
    monkeypatch.setattr(comparison, "EXCHANGES", 9)  # the p value is not looked at

    def made(draw):
        before, texts = clustered(draw)
        after, _ = clustered(draw)
        return comparison.difference(means(before), means(after), texts)

    assert 0.93 <= covered(made) <= 0.97


def test_equal_systems_have_no_difference():
    terms = means(np.random.default_rng(0).integers(0, 2, 200))
    found = comparison.difference(terms, terms.copy())
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_p_of_correct_rows_is_that_of_mcnemar():
    before = np.array([1] * 60 + [0] * 12 + [1] * 3 + [0] * 25)
    after = np.array([1] * 60 + [1] * 12 + [0] * 3 + [0] * 25)
    found = comparison.difference(means(before), means(after))
    exact = stats.binomtest(3, 15, 0.5).pvalue
    assert found.p == pytest.approx(exact, abs=0.004)


def test_four_changed_rows_of_two_hundred_are_no_evidence():
    """Student's t alone would claim a difference here (p = 0.045)."""
    before, after = np.zeros(200), np.zeros(200)
    after[:4] = 1
    assert stats.ttest_rel(after, before).pvalue < 0.05
    assert comparison.difference(means(before), means(after)).p == pytest.approx(0.125, abs=0.01)


def test_equally_good_systems_are_rarely_called_different():
    called = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        before, after = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
        called += comparison.difference(means(before), means(after)).p < 0.05
    assert called <= 0.08 * 200


def test_a_gain_of_ten_points_on_two_hundred_rows_is_found():
    """Half of the answers are right before, 60% after; 3% of all rows get worse."""
    found = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        before = draw.random(200) < 0.5
        after = np.where(before, draw.random(200) < 0.94, draw.random(200) < 0.26)
        found += comparison.difference(means(before), means(after)).p < 0.05
    assert found >= 0.8 * 200


def test_the_detectable_difference_is_seen_four_times_in_five():
    draw = np.random.default_rng(1)
    noise = [draw.normal(size=100) for _ in range(2)]
    known = comparison.difference(means(noise[0]), means(noise[1]))
    size = 2.8 * np.sqrt(2 / 100)  # two independent systems of variance 1
    assert known.detectable == pytest.approx(size, rel=0.15)
    assert known.rows_for(known.detectable / 2) == pytest.approx(400, rel=0.01)
    found = sum(stats.ttest_rel(draw.normal(size, 1, 100), draw.normal(0, 1, 100)).pvalue < 0.05 for _ in range(500))
    assert 0.75 <= found / 500 <= 0.85


def test_a_figure_that_is_no_ratio_has_the_interval_of_a_bootstrap():
    def root(sums):
        return np.sqrt(np.maximum(sums[:, 0] / sums[:, 1], 0))

    values = np.random.default_rng(0).exponential(4, 300)
    found, plain = comparison.interval(means(values), of_sums=root), comparison.interval(means(values))
    assert (found.low**2, found.high**2) == pytest.approx((plain.low, plain.high), rel=0.03)


def test_order_of_systems_changes_the_sign_alone():
    draw = np.random.default_rng(3)
    terms = means(draw.random(50)), means(draw.random(50))
    one, other = comparison.difference(*terms), comparison.difference(*terms[::-1])
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p == pytest.approx(other.p, abs=0.02)


def test_holm_adjusts_as_published():
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([]) == []


@pytest.mark.parametrize("terms", [means([1.0]), np.zeros((5, 2))])
def test_nothing_to_compare(terms):
    assert comparison.interval(terms) is None and comparison.difference(terms, terms) is None
