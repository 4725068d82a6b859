"""Compare two systems on the same prompts: difference, interval, p value, and the difference that would be seen.

A figure is a function of sums over rows: a mean, a ratio, or BLEU. Rows that belong together (the questions on
one text, the samples of one prompt) form a cluster and are drawn together, because their errors depend on each
other (Miller, Adding Error Bars to Evals, arXiv:2411.00640, section 2.2).

The p value is that of approximate randomisation (Noreen 1989): if the systems are equally good, the results of
a cluster may as well be exchanged. For a share of correct rows this is McNemar's test. The interval of a ratio
uses the cluster-robust standard error of a ratio (Cochran, Sampling Techniques, 1977, eq. 6.10) and Student's
t, that of a share of rows is Wilson's, and that of any other figure comes from a bootstrap over clusters (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 10.3); a difference uses the same draw for both
systems, so that the effect of rows that are hard for both cancels. Random numbers are seeded. Fewer than ``FEWEST``
clusters have no interval: their spread says too little about others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.metrics.intervals import (
    LEVEL,
    MOST_TERMS,
    Clusters,
    Interval,
    Place,
    RowFigure,
    ends,
    figure_ends,
    wilson,
)
from tunesmith.metrics.sum_functions import FUNCTIONS, OfSums, exponential, ratio

EXCHANGES = 9999
"""Random exchanges of a test: the smallest p value is 1 / 10,000."""
DRAWS, FEWEST_DRAWS = 1000, 200
DRAWN_CLUSTERS = 4_000_000
"""Clusters drawn for one interval. More clusters get fewer draws (at least ``FEWEST_DRAWS``), to bound the time."""
POWER = 0.8
FEWEST = 10
"""Clusters that an interval needs."""
_AT_ONCE = 50_000
"""Random numbers in memory at once, so that memory does not grow with the rows."""


@dataclass(frozen=True)
class Difference:
    """The figure of the second system minus that of the first. ``low`` and ``high`` are None for fewer than
    ``FEWEST`` clusters."""

    value: float
    low: float | None
    high: float | None
    p: float
    """Probability of a difference at least this large if the systems are equally good."""
    rows: int
    clusters: int
    detectable: float
    """Difference that such rows show with a probability of 80% (``POWER``)."""

    def rows_for(self, difference: float) -> int:
        """Return how many rows would show ``difference`` with a probability of 80%."""
        return int(np.ceil(self.rows * (self.detectable / abs(difference)) ** 2))


def interval(
    terms: np.ndarray, clusters: Sequence[Hashable] | None = None, of_sums: OfSums = ratio
) -> Interval | None:
    """Return the figure of ``terms`` (rows, k) with its 95% interval.

    ``clusters``: the cluster of each row; None = each row is its own. None for fewer than ``FEWEST`` clusters or
    a figure that is not defined.
    """
    summed = _by_cluster(terms, clusters)
    value = _figure(summed, of_sums)
    if len(summed) < FEWEST or not np.isfinite(value):
        return None
    if of_sums is ratio:
        return Interval(value, *_ends_of_ratio(summed, value), len(terms))
    if of_sums is exponential:
        low, high = of_sums(np.array([[one, 1.0] for one in _ends_of_ratio(summed, np.log(value))]))
        return Interval(value, float(low), float(high), len(terms))
    drawn = of_sums(np.concatenate([block @ summed for block in _counts(len(summed))]))
    return Interval(value, *figure_ends(of_sums, value, drawn), len(terms))


def _ends_of_ratio(summed: np.ndarray, value: float) -> tuple[float, float]:
    """Return the ends of the interval of a ratio. They stay in the range that the terms allow, such as 0 to 1."""
    is_share = bool((summed[:, 0] >= 0).all() and (summed[:, 0] <= summed[:, 1]).all())
    error = _error(_influences(summed))
    is_of_rows = bool(np.isin(summed[:, 0], (0, 1)).all() and (summed[:, 1] == 1).all())
    if is_of_rows or (is_share and error == 0 and value in (0, 1)):  # equal clusters have no spread
        return wilson(value, len(summed))
    half = _t(len(summed)) * error
    low = max(0.0, value - half) if (summed[:, 0] >= 0).all() else value - half
    return low, min(1.0, value + half) if is_share else value + half


def of_figure(figure: RowFigure, clusters: Clusters | None = None) -> Interval | None:
    """Return a figure of rows with its interval. None as for :func:`interval`, and for more than ``MOST_TERMS``."""
    places = list(figure.rows)
    if not _can_be_drawn(figure.terms(places)):
        return None
    found = interval(figure.terms(places), _clusters_of(places, clusters), FUNCTIONS[figure.function])
    return found if found is not None and np.isfinite([found.low, found.high]).all() else None


def of_difference(before: RowFigure, after: RowFigure, clusters: Clusters | None = None) -> Interval | None:
    """Return ``after`` minus ``before`` over the rows that both have, with its interval.

    None as for a figure, and for figures with other terms, such as those of other classes."""
    places = sorted(before.rows.keys() & after.rows.keys())
    sides = before.terms(places), after.terms(places)
    is_same = before.function == after.function and sides[0].shape == sides[1].shape
    if not is_same or not all(map(_can_be_drawn, sides)):
        return None
    found = paired_interval(*sides, _clusters_of(places, clusters), FUNCTIONS[after.function])
    return found if found is not None and np.isfinite([found.low, found.high]).all() else None


def _can_be_drawn(terms: np.ndarray) -> bool:
    return 0 < terms.size <= MOST_TERMS and bool(np.isfinite(terms).all())


def _clusters_of(places: Sequence[Place], clusters: Clusters | None) -> list[Hashable] | None:
    """Return the cluster of each row; None if each row is its own."""
    return [clusters.get(place, place) for place in places] if clusters else None


@dataclass(frozen=True)
class _Paired:
    """Two systems by cluster: the difference of their figures, its standard error and its interval."""

    before: np.ndarray
    after: np.ndarray
    value: float
    error: float
    low: float | None
    high: float | None


def paired_interval(
    first: np.ndarray,
    second: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    of_sums: OfSums = ratio,
) -> Interval | None:
    """Return the figure of ``second`` minus that of ``first`` with its interval, as ``difference`` does."""
    found = _pair(first, second, clusters, of_sums)
    if found is None or found.low is None or found.high is None:
        return None
    return Interval(found.value, found.low, found.high, len(first))


def difference(
    first: np.ndarray,
    second: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    of_sums: OfSums = ratio,
) -> Difference | None:
    """Compare two systems; ``first`` and ``second`` are their terms (rows, k) on the same rows.

    None for fewer than two clusters or a figure that is not defined. Systems with equal terms have a
    difference of 0, the interval [0, 0] and p = 1. Raises ValueError if the shapes differ.
    """
    from scipy.special import ndtri  # not at the top: reports import this module and read figures alone

    found = _pair(first, second, clusters, of_sums)
    if found is None:
        return None
    quantiles = ndtri((1 + LEVEL) / 2) + ndtri(POWER)
    p = _exchange_p(found.before, found.after, of_sums, abs(found.value))
    detectable = float(quantiles * found.error)
    return Difference(found.value, found.low, found.high, p, len(first), len(found.before), detectable)


def _pair(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[Hashable] | None, of_sums: OfSums
) -> _Paired | None:
    if first.shape != second.shape:
        raise ValueError(f"the systems have terms of shapes {first.shape} and {second.shape}")
    before, after = _by_cluster(first, clusters), _by_cluster(second, clusters)
    figures = [_figure(summed, of_sums) for summed in (before, after)]
    if len(before) < 2 or not np.isfinite(figures).all():
        return None
    value = figures[1] - figures[0]
    if of_sums is ratio:
        error = _error(_influences(after) - _influences(before))
        half = _t(len(before)) * error
        low, high = value - half, value + half
    else:
        counts = _counts(len(before))
        drawn = np.concatenate([of_sums(block @ after) - of_sums(block @ before) for block in counts])
        error = float(np.nanstd(drawn))
        low, high = ends(of_sums, value, drawn)
    if len(before) < FEWEST:
        return _Paired(before, after, value, error, None, None)
    return _Paired(before, after, value, error, low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm 1979): with all of them compared with 0.05, the probability of
    any false difference is at most 0.05."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = raised
    return [float(value) for value in adjusted]


def _figure(summed: np.ndarray, of_sums: OfSums) -> float:
    return float(of_sums(summed.sum(axis=0, keepdims=True))[0])


def _by_cluster(terms: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """Return the sums (clusters, k) of the rows of each cluster."""
    if clusters is None:
        return np.asarray(terms, np.float64)
    if len(clusters) != len(terms):
        raise ValueError(f"{len(terms)} rows have {len(clusters)} clusters")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    summed = np.zeros((len(numbers), terms.shape[1]))
    np.add.at(summed, places, terms)
    return summed


def _influences(summed: np.ndarray) -> np.ndarray:
    """Return what each cluster (clusters, 2) adds to the error of the ratio of sums."""
    above, below = summed.sum(axis=0)
    return np.asarray((summed[:, 0] - above / below * summed[:, 1]) / below)


def _error(influences: np.ndarray) -> float:
    clusters = len(influences)
    return float(np.sqrt(clusters / (clusters - 1) * np.sum(influences**2)))


def _t(clusters: int) -> float:
    """Return the quantile of Student's t that an interval of this many clusters takes."""
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, (1 + LEVEL) / 2))


def _counts(clusters: int) -> Iterator[np.ndarray]:
    """Yield blocks (draws, clusters): how often each draw of a bootstrap holds each cluster."""
    generator = np.random.default_rng(0)
    step = max(1, _AT_ONCE // clusters)
    draws = int(np.clip(DRAWN_CLUSTERS // clusters, FEWEST_DRAWS, DRAWS))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        yield generator.multinomial(clusters, np.full(clusters, 1 / clusters), size).astype(float)


def _exchange_p(before: np.ndarray, after: np.ndarray, of_sums: OfSums, seen: float) -> float:
    """Return the p value of approximate randomisation, two-sided."""
    changed = np.flatnonzero((before != after).any(axis=1))
    if not len(changed):
        return 1.0
    generator = np.random.default_rng(0)
    totals, gaps = (before.sum(axis=0), after.sum(axis=0)), (after - before)[changed]
    as_large = 0
    step = max(1, _AT_ONCE // len(changed))
    for start in range(0, EXCHANGES, step):
        exchanged = generator.integers(0, 2, (min(step, EXCHANGES - start), len(changed))) @ gaps
        drawn = of_sums(totals[1] - exchanged) - of_sums(totals[0] + exchanged)
        as_large += int(np.sum(np.abs(drawn) >= seen - 1e-12))
    return (as_large + 1) / (EXCHANGES + 1)
