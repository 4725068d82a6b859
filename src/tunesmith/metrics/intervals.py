"""Figures as each row's terms, and the ends of a confidence interval. ``comparison`` computes intervals.

A figure is a function of sums over rows. Most are a ratio of two sums: a mean loss, an accuracy, an F1 (twice
the true positives, divided by the sum of predicted and gold positives). Others, such as macro F1, need more
sums (``sum_functions``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tunesmith.metrics.sum_functions import BIASED, FUNCTIONS, OfSums, ratio

LEVEL = 0.95
MOST_TERMS = 4_000_000
"""Rows times terms of a row. A figure with more, such as the macro F1 of thousands of classes, has no interval."""

Place = tuple[int, int]
"""Identity of a row: (index of its source, row in the source's file)."""
RowValues = Mapping[Place, tuple[float, ...]]
"""Row -> its terms of each sum: of a ratio, those of the numerator and of the denominator."""
Clusters = Mapping[Place, Hashable]
"""Row -> its cluster. A row that is missing is a cluster of its own."""


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
        if not self.rows:
            return None
        value = float(FUNCTIONS[self.function](self.terms(list(self.rows)).sum(axis=0)[None])[0])
        return value if np.isfinite(value) else None

    def terms(self, places: Sequence[Place]) -> np.ndarray:
        """Return the terms (rows, k) of the rows at ``places``."""
        if not places:
            return np.zeros((0, 0))
        return np.array([self.rows[place] for place in places], np.float64).reshape(len(places), -1)


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
