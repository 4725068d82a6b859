"""Compute confidence intervals of figures, and of the difference between two evaluations of the same rows.

A figure is a function of sums over rows. Most are a ratio of two sums: a mean loss, an accuracy, an F1 (twice
the true positives, divided by the sum of predicted and gold positives). Others, such as macro F1, need more
sums (``sum_functions``). The bootstrap draws whole rows with replacement, because the tokens of a row depend on
each other (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 10.3). For a
difference, both evaluations use the same draw (a paired bootstrap), so that the effect of rows that are hard
for both cancels. The draws are seeded, so equal rows have equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tunesmith.metrics.sum_functions import BIASED, FUNCTIONS, OfSums, ratio

LEVEL = 0.95
MOST_DRAWS, FEWEST_DRAWS = 1000, 200
DRAWN_ROWS = 4_000_000
"""Rows drawn for one interval. Larger sets get fewer draws (at least ``FEWEST_DRAWS``), to bound the time."""
MOST_TERMS = 4_000_000
"""Rows times terms of a row. A figure with more, such as the macro F1 of thousands of classes, has no interval."""

Place = tuple[int, int]
"""Identity of a row: (index of its source, row in the source's file)."""
RowValues = Mapping[Place, tuple[float, ...]]
"""Row -> its terms of each sum: of a ratio, those of the numerator and of the denominator."""


@dataclass(frozen=True)
class RowFigure:
    """A figure as each row's terms. ``function``: a name of ``sum_functions.FUNCTIONS``.

    ``columns``: names of the terms, such as those of the classes, where two models may differ in them."""

    rows: RowValues
    function: str = "ratio"
    columns: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """The figure of these rows; None where it is not defined."""
        value = float(_figures(self.function, _matrix(self, list(self.rows)).sum(axis=0)[None])[0])
        return value if np.isfinite(value) else None


@dataclass(frozen=True)
class Interval:
    """A figure or a difference with its 95% interval, over ``rows`` rows."""

    value: float
    low: float
    high: float
    rows: int

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def of_figure(figure: RowFigure) -> Interval | None:
    """Return a figure with its interval: Wilson's for a share of rows, else a bootstrap's.

    None for fewer than two rows, or a value that is not finite."""
    terms = _matrix(figure, list(figure.rows))
    if not _can_be_drawn(terms):
        return None
    value = float(_figures(figure.function, terms.sum(axis=0)[None])[0])
    if not np.isfinite(value):
        return None
    if figure.function == "ratio" and np.isin(terms[:, 0], (0, 1)).all() and (terms[:, 1] == 1).all():
        low, high = wilson(value, len(terms))
    else:
        drawn = np.concatenate([_figures(figure.function, counts @ terms) for counts in _draws(len(terms))])
        low, high = figure_ends(FUNCTIONS[figure.function], value, drawn)
    return Interval(value, low, high, len(terms)) if np.isfinite([low, high]).all() else None


def of_difference(before: RowFigure, after: RowFigure) -> Interval | None:
    """Return ``after`` minus ``before`` over the rows that both have, with a paired bootstrap interval.

    None for fewer than two common rows, or a value that is not finite."""
    places = sorted(before.rows.keys() & after.rows.keys())
    sides = [(one.function, _matrix(one, places)) for one in (before, after)]
    if not all(_can_be_drawn(terms) for _, terms in sides):
        return None
    first, second = (float(_figures(name, terms.sum(axis=0)[None])[0]) for name, terms in sides)
    drawn = np.concatenate([
        np.subtract(*(_figures(name, counts @ terms) for name, terms in reversed(sides)))
        for counts in _draws(len(places))
    ])  # fmt: skip
    value = second - first
    if not np.isfinite(value):
        return None
    low, high = ends(FUNCTIONS[after.function], value, drawn)
    return Interval(value, low, high, len(places)) if np.isfinite([low, high]).all() else None


def _matrix(figure: RowFigure, places: list[Place]) -> np.ndarray:
    """Return the terms (rows, k) of the rows at ``places``."""
    if not places:
        return np.zeros((0, 0))
    return np.array([figure.rows[place] for place in places], np.float64).reshape(len(places), -1)


def _figures(function: str, sums: np.ndarray) -> np.ndarray:
    return FUNCTIONS[function](sums) if sums.shape[1] else np.full(len(sums), np.nan)


def _can_be_drawn(terms: np.ndarray) -> bool:
    return len(terms) > 1 and terms.size <= MOST_TERMS and bool(np.isfinite(terms).all())


def _draws(rows: int) -> Iterator[np.ndarray]:
    """Yield blocks (draws, rows): how often each draw of rows, with replacement, holds each row."""
    generator = np.random.default_rng(0)
    draws = int(np.clip(DRAWN_ROWS // rows, FEWEST_DRAWS, MOST_DRAWS))
    for first in range(0, draws, 100):  # a hundred at a time, to bound memory
        drawn = generator.integers(0, rows, (min(100, draws - first), rows))
        yield np.stack([np.bincount(one, minlength=rows) for one in drawn]).astype(np.float64)


def ends(of_sums: OfSums, value: float, drawn: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval of ``value`` from the figures ``drawn``. Those that are nan are left out."""
    low, high = _middle(drawn)
    if of_sums is ratio:
        return low, high
    if of_sums in BIASED:
        low, high = 2 * value - high, 2 * value - low
    return min(low, value), max(high, value)


def figure_ends(of_sums: OfSums, value: float, drawn: np.ndarray) -> tuple[float, float]:
    """Return :func:`ends` of a figure, not of a difference: a calibration error is not negative."""
    low, high = ends(of_sums, value, drawn)
    return (max(low, 0.0) if of_sums in BIASED else low), high


def _middle(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Return the score interval of Wilson 1927 (Brown, Cai and DasGupta 2001, equation 4)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
