"""Intervals of figures over rows, and of differences between two evaluations of the same rows."""

import numpy as np
import pytest
from scipy.stats import binomtest

from tunesmith.metrics import comparison
from tunesmith.metrics.class_problems import PROBLEMS, calibration_terms, f1_of_each
from tunesmith.metrics.comparison import of_difference, of_figure
from tunesmith.metrics.intervals import RowFigure


def rows(values, weights=None, function="ratio"):
    weights = np.ones(len(values)) if weights is None else weights
    known = {(0, row): (float(value), float(weight)) for row, (value, weight) in enumerate(zip(values, weights))}
    return RowFigure(known, function)


@pytest.mark.parametrize(("right", "count"), [(0, 17), (3, 20), (50, 50), (777, 1000)])
def test_a_share_of_rows_has_wilsons_interval(right, count):
    found = of_figure(rows([1] * right + [0] * (count - right)))
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_interval_of_a_mean_agrees_with_the_normal_one():
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
    backwards = RowFigure(dict(reversed(list(after.rows.items()))))
    assert of_difference(before, after) == of_difference(before, backwards)
    assert of_difference(before, after) == of_difference(RowFigure({**before.rows, (1, 0): (9.0, 1.0)}), after)


def test_there_is_no_interval_of_few_rows_or_without_something_to_divide_by():
    few, nothing = [1, 0, 1] * 3, np.zeros(10)
    assert of_figure(rows(few)) is None and of_difference(rows(few), rows(few)) is None and of_figure(RowFigure({})) is None
    assert of_figure(rows([*few, 1])) is not None
    assert rows(nothing, nothing).value is None and of_figure(rows(nothing, nothing)) is None
    assert of_difference(rows(nothing, nothing), rows([1, 2] * 5)) is None
    assert of_figure(rows([float("nan"), *few])) is None


def test_rows_of_one_cluster_count_once():
    """Ten copies of each row say no more than one of each."""
    values = np.random.default_rng(7).normal(2, 1, 30)
    alone, copied = rows(values), rows(np.repeat(values, 10))
    clusters = {place: place[1] // 10 for place in copied.rows}
    once, clustered, fooled = of_figure(alone), of_figure(copied, clusters), of_figure(copied)
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert fooled.high - fooled.low < (once.high - once.low) / 3
    before = RowFigure({place: (0.0, 1.0) for place in copied.rows})
    change = of_difference(before, copied, clusters)
    assert (change.low, change.high) == pytest.approx((once.low, once.high))
    of_nine = {place: place[1] // 34 for place in copied.rows}
    assert of_figure(copied, of_nine) is None, "nine documents are too few, whatever their rows"


def test_an_interval_stays_in_the_range_of_its_figure():
    """The F1 of a tagger that is nearly always right is at most 1; a mean of ten equal answers is not certain."""
    hits = np.array([2.0] * 59 + [0.0])
    found = of_figure(rows(hits * 3, np.full(60, 6.0)))
    assert found.value == pytest.approx(59 / 60) and found.low < found.value < found.high == 1
    clusters = {(0, row): row // 2 for row in range(60)}
    assert of_figure(rows(np.ones(60)), clusters).low == pytest.approx(binomtest(30, 30).proportion_ci(0.95, "wilson").low)
    assert of_figure(rows(np.abs(np.random.default_rng(0).normal(0, 1, 12)) ** 9)).low == 0


def test_an_exponential_has_the_exponentials_of_the_interval():
    draw = np.random.default_rng(4)
    before, after = rows(draw.normal(40, 9, 60), draw.integers(5, 30, 60)), rows(draw.normal(30, 9, 60), draw.integers(5, 30, 60))
    perplexities = [RowFigure(one.rows, "exponential") for one in (before, after)]
    loss, perplexity = of_figure(before), of_figure(perplexities[0])
    assert (perplexity.low, perplexity.high) == pytest.approx((np.exp(loss.low), np.exp(loss.high)), rel=1e-3)
    change = of_difference(*perplexities)
    assert change.value == pytest.approx(np.exp(after.value) - np.exp(before.value)) and change.low < change.value < change.high
    large = rows([800.0, 900.0] * 30, function="exponential")  # exp overflows
    assert of_figure(large) is None and of_difference(perplexities[0], large) is None


def of_problem(name, seed, count=60):
    """Scores and targets of a problem, with a class that few draws hold."""
    draw = np.random.default_rng(seed)
    names = ["rare", "b", "c", "d"]
    if name == "regression":
        targets = draw.normal(1e4, 2, (count, 1))
        return targets + draw.normal(0, 1, (count, 1)), targets, ["score"]
    scores = draw.dirichlet(np.ones(4), count) if name.startswith("single") else draw.random((count, 4))
    targets = scores.argsort(axis=1)[:, -1:] if name.startswith("single") else (scores > draw.random((count, 4))).astype(float)
    changed = draw.random(count) < 0.4
    targets[changed] = draw.integers(0, 4, (count, 1))[changed] if name.startswith("single") else 1 - targets[changed]
    targets[targets == 0] = 1 if name.startswith("single") else 0
    targets[0] = 0
    scores[1:, 0] *= 0 if name.startswith("single") else 1
    return scores, targets, names


def drawn_rows(count):
    """The rows of each draw of a bootstrap: those that ``comparison`` draws."""
    return [np.repeat(np.arange(count), one.astype(int)) for block in comparison._counts(count) for one in block]


@pytest.mark.parametrize("name", PROBLEMS)
def test_intervals_of_every_figure_are_those_of_a_direct_bootstrap(name, monkeypatch):
    """The figures are computed again, by the code of the metrics, from the rows of each draw."""
    monkeypatch.setattr(comparison, "DRAWS", 80)
    problem, (scores, targets, names), count = PROBLEMS[name], of_problem(name, 5), 60
    places, losses = [(0, row) for row in range(count)], np.ones(count)
    again = scores[:, ::-1] if name != "regression" else scores + np.random.default_rng(1).normal(0, 2, scores.shape)
    figures, other = (problem.row_figures(places, one, targets, losses, names, 0.5) for one in (scores, again))

    def directly(rows, chosen):
        return problem.measure(targets[rows], chosen[rows], names, 0.5)

    sides = [[directly(rows, one) for rows in drawn_rows(count)] for one in (scores, again)]
    everything = [directly(np.arange(count), one) for one in (scores, again)]
    wanted = {"macro_f1", "calibration_error"} if name != "regression" else {"rmse", "r2", "pearson"}
    assert wanted <= {key.removeprefix("eval_") for key in figures}
    for key in wanted:
        value, was = (one[key] for one in everything)
        drawn, drawn_before = (np.array([one[key] for one in side]) for side in sides)
        found, change = of_figure(figures[f"eval_{key}"]), of_difference(other[f"eval_{key}"], figures[f"eval_{key}"])
        assert found.value == pytest.approx(value) and change.value == pytest.approx(value - was), key
        for interval, centre, values in ((found, value, drawn), (change, value - was, drawn - drawn_before)):
            low, high = np.quantile(values, [0.025, 0.975])
            if key == "calibration_error":  # the basic interval: chance makes a gap in every bin of a draw
                low, high = 2 * centre - high, 2 * centre - low
            low, high = min(low, centre), max(high, centre)
            if interval is found and key == "calibration_error":
                low = max(low, 0)
            assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-9), key
    for label, of_class in f1_of_each(figures.get("eval_macro_f1")).items():
        found, drawn = of_figure(of_class), [one["per_class"][label]["f1"] for one in sides[0]]
        assert of_class.value == found.value == pytest.approx(everything[0]["per_class"][label]["f1"]), label
        if label != "rare":  # scikit-learn calls the F1 of a class that no row has 0
            assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.08), label


def test_pairs_of_a_row_are_drawn_together():
    confidence, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1.0, 0.0, 1.0, 0.5])
    terms = calibration_terms(confidence, right, rows=np.array([0, 0, 0, 1])).at([(0, 4), (0, 9)])
    assert list(terms.rows) == [(0, 4), (0, 9)] and [row[-1] for row in terms.rows.values()] == [3, 1]
    assert terms.value == pytest.approx((0.1 + 0.8 + 0.3 + 0.1) / 4)


def test_a_calibration_error_that_chance_makes_has_an_interval_that_holds_almost_zero():
    """Of a model that is calibrated, the percentile interval would begin far above 0."""
    draw = np.random.default_rng(6)
    confidence = draw.uniform(0.5, 1, 300)
    figure = calibration_terms(confidence, draw.random(300) < confidence).at([(0, row) for row in range(300)])
    found = of_figure(figure)
    assert found.low < 0.02 < found.value <= found.high


def test_a_figure_with_too_many_terms_has_no_interval(monkeypatch):
    figure = calibration_terms(np.full(50, 0.7), np.ones(50)).at([(0, row) for row in range(50)])
    assert of_figure(figure) is not None
    monkeypatch.setattr(comparison, "MOST_TERMS", 50 * 15)
    assert of_figure(figure) is None and figure.value == pytest.approx(0.3)
