"""Compute confidence intervals of figures, and of the difference between two evaluations of the same rows.

A figure is a ratio of two sums over rows: a mean loss, an accuracy, an F1 (twice the true positives, divided
by the sum of predicted and gold positives). The bootstrap draws whole rows with replacement, because the
tokens of a row depend on each other (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections
13.3 and 10.3). For a difference, both evaluations use the same draw (a paired bootstrap), so that the effect
of rows that are hard for both cancels. The draws are seeded, so equal rows have equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
MOST_DRAWS, FEWEST_DRAWS = 1000, 200
DRAWN_ROWS = 4_000_000
"""Rows drawn for one interval. Larger sets get fewer draws (at least ``FEWEST_DRAWS``), to bound the time."""

LARGEST_EXPONENT = 700
"""exp of a larger number is beyond the range of a float; such a perplexity has no interval."""

Place = tuple[int, int]
"""Identity of a row: (index of its source, row in the source's file)."""
RowValues = Mapping[Place, tuple[float, float]]
"""Row -> its terms of a figure's numerator and denominator."""


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


def figure(rows: RowValues) -> float | None:
    """Return the figure of these rows; None where the denominator is 0."""
    above, below = np.array(list(rows.values()), np.float64).reshape(-1, 2).sum(axis=0)
    return float(above / below) if below else None


def of_figure(rows: RowValues, exponential: bool = False) -> Interval | None:
    """Return a figure with its interval: Wilson's for a share of rows, else a bootstrap's.

    ``exponential``: of exp(figure), as perplexity is of the mean loss. exp is monotone, so the ends of the
    interval are the exponentials of the figure's. None for fewer than two rows, a value that is not finite,
    or a denominator of 0."""
    values = np.array(list(rows.values()), np.float64).reshape(-1, 2)
    if not _can_be_drawn(values):
        return None
    value = float(values[:, 0].sum() / values[:, 1].sum())
    if np.isin(values[:, 0], (0, 1)).all() and (values[:, 1] == 1).all():
        found = (value, *_wilson(value, len(values)))
    else:
        above, below = _draws(values).T
        found = (value, *_middle(_divide(above, below)))
    if exponential:
        found = (_exp(found[0]), _exp(found[1]), _exp(found[2]))
    return Interval(*found, len(values)) if np.isfinite(found).all() else None


def of_difference(before: RowValues, after: RowValues, exponential: bool = False) -> Interval | None:
    """Return ``after`` minus ``before`` over the rows that both have, with a paired bootstrap interval.

    ``exponential``: of the difference of exp(figure). None for fewer than two common rows, a value that is
    not finite, or a denominator of 0."""
    places = sorted(before.keys() & after.keys())
    values = np.array([(*before[place], *after[place]) for place in places], np.float64).reshape(-1, 4)
    if not (_can_be_drawn(values[:, :2]) and _can_be_drawn(values[:, 2:])):
        return None
    sums = values.sum(axis=0)
    drawn = _draws(values).T
    ratios = [sums[0] / sums[1], sums[2] / sums[3], _divide(drawn[0], drawn[1]), _divide(drawn[2], drawn[3])]
    if exponential:
        if max(ratios[:2]) >= LARGEST_EXPONENT:
            return None
        ratios = [np.exp(np.minimum(one, LARGEST_EXPONENT)) for one in ratios]
    found = (float(ratios[1] - ratios[0]), *_middle(ratios[3] - ratios[2]))
    return Interval(*found, len(places))


def _can_be_drawn(values: np.ndarray) -> bool:
    return len(values) > 1 and bool(np.isfinite(values).all()) and float(values[:, 1].sum()) != 0


def _draws(values: np.ndarray) -> np.ndarray:
    """Return the sums (draws, k) of ``values`` (rows, k) over rows drawn with replacement."""
    rows = len(values)
    generator = np.random.default_rng(0)
    draws = int(np.clip(DRAWN_ROWS // rows, FEWEST_DRAWS, MOST_DRAWS))
    sums = []
    for first in range(0, draws, 100):  # a hundred at a time, to bound memory
        drawn = generator.integers(0, rows, (min(100, draws - first), rows))
        sums.append(values[drawn].sum(axis=1))
    return np.concatenate(sums)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the ratios of the draws. A draw with a denominator of 0 is nan: the interval leaves it out."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _exp(value: float) -> float:
    """Return exp(value), inf where it is too large."""
    return math.exp(value) if value < LARGEST_EXPONENT else math.inf


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    """Return the score interval of Wilson 1927 (Brown, Cai and DasGupta 2001, equation 4)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
