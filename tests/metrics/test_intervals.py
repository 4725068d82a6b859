"""Intervals of figures over rows, and of differences between two evaluations of the same rows."""

import numpy as np
import pytest
from scipy.stats import binomtest

from tunesmith.metrics.intervals import figure, of_difference, of_figure


def rows(values, weights=None):
    weights = np.ones(len(values)) if weights is None else weights
    return {(0, row): (float(value), float(weight)) for row, (value, weight) in enumerate(zip(values, weights))}


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 20), (50, 50), (777, 1000)])
def test_a_share_of_rows_has_wilsons_interval(right, count):
    found = of_figure(rows([1] * right + [0] * (count - right)))
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(2, 3, 400)
    found, error = of_figure(rows(values)), 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.12 * error)


def test_rows_that_are_hard_for_both_cancel():
    """A difference of the same rows is known better than each of the two figures."""
    draw = np.random.default_rng(2)
    hard, gain = draw.normal(0, 5, 100), draw.normal(-0.5, 0.2, 100)
    found, alone = of_difference(rows(hard), rows(hard + gain)), of_figure(rows(hard))
    assert found.value == pytest.approx(gain.mean()) and found.high < 0
    assert found.high - found.low < (alone.high - alone.low) / 10
    assert of_difference(rows(hard), rows(hard)).holds_zero


def test_the_order_of_rows_and_rows_of_one_side_do_not_count():
    values = np.random.default_rng(3).normal(0, 1, 30)
    before, after = rows(values), rows(values**2, np.arange(1, 31))
    backwards = dict(reversed(list(after.items())))
    assert of_difference(before, after) == of_difference(before, backwards)
    assert of_difference(before, after) == of_difference({**before, (1, 0): (9.0, 1.0)}, after)


def test_there_is_no_interval_without_two_rows_or_something_to_divide_by():
    assert of_figure(rows([1])) is None and of_figure({}) is None
    assert figure(rows([0, 0], [0, 0])) is None and of_figure(rows([0, 0], [0, 0])) is None
    assert of_difference(rows([0, 0], [0, 0]), rows([1, 2])) is None
    assert of_figure(rows([float("nan"), 1])) is None


def test_an_exponential_has_the_exponentials_of_the_interval():
    draw = np.random.default_rng(4)
    before, after = rows(draw.normal(40, 9, 60), draw.integers(5, 30, 60)), rows(draw.normal(30, 9, 60), draw.integers(5, 30, 60))
    loss, perplexity = of_figure(before), of_figure(before, exponential=True)
    assert (perplexity.low, perplexity.high) == pytest.approx((np.exp(loss.low), np.exp(loss.high)))
    change = of_difference(before, after, exponential=True)
    assert (
        change.value == pytest.approx(np.exp(figure(after)) - np.exp(figure(before))) and change.low < change.value < change.high
    )
    large = rows([800.0, 900.0])  # exp overflows
    assert of_figure(large, exponential=True) is None and of_difference(before, large, exponential=True) is None
