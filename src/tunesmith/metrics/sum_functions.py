"""Figures as functions of sums of the rows' terms: what an interval must compute again for each draw of rows.

They have names, because a run folder keeps the terms of its rows together with the name of the function. Sums
are (draws, k), figures (draws,); nan where a figure is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

OfSums = Callable[[np.ndarray], np.ndarray]
"""Sums (n, k) of the terms over rows -> figures (n,)."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first sum divided by the second. ``sums``: (n, 2)."""
    return _divide(sums[:, 0], sums[:, 1])


def exponential(sums: np.ndarray) -> np.ndarray:
    """Return exp(ratio), such as the perplexity; inf where it is too large."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ratio(sums)))


def root(sums: np.ndarray) -> np.ndarray:
    """Return the square root of a ratio, such as the root of the mean squared error."""
    return np.asarray(np.sqrt(ratio(sums)))


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the classes that are true or predicted at least once in a draw.

    ``sums``: (n, 2 classes). First, for each class, twice its true positives; then its true and predicted rows.
    """
    hits, marks = np.split(sums, 2, axis=1)
    return _divide(_divide(hits, marks, 0.0).sum(axis=1), (marks > 0).sum(axis=1))


def macro_f1_of_all(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 of all classes; an undefined F1 is 0. ``sums`` as for :func:`macro_f1`."""
    hits, marks = np.split(sums, 2, axis=1)
    return np.asarray(_divide(hits, marks, 0.0).mean(axis=1))


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the sum of |gap| over the bins, divided by the number of forecasts.

    ``sums``: (n, bins + 1), confidence minus accuracy summed over each bin's forecasts; last, their number."""
    return _divide(np.abs(sums[:, :-1]).sum(axis=1), sums[:, -1])


def r2(sums: np.ndarray) -> np.ndarray:
    """Return 1 - squared errors / variance. ``sums``: (n, 4) of squared error, gold, gold squared, rows."""
    errors, gold, squares, rows = sums.T
    return 1 - _divide(errors, squares - _divide(gold * gold, rows))


def pearson(sums: np.ndarray) -> np.ndarray:
    """Return the correlation of x and y. ``sums``: (n, 6) of x, y, x x, y y, x y, rows."""
    x, y, xx, yy, xy, rows = sums.T
    spread = (xx - _divide(x * x, rows)) * (yy - _divide(y * y, rows))
    return _divide(xy - _divide(x * y, rows), np.sqrt(np.maximum(spread, 0)))


@cache
def bleu_scorer() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


@cache
def chrf_scorer() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def bleu(sums: np.ndarray) -> np.ndarray:
    """Return BLEU of the corpus. ``sums``: (n, 10), the statistics that sacrebleu adds over rows."""
    return _corpus_scores(bleu_scorer(), sums)


def chrf(sums: np.ndarray) -> np.ndarray:
    """Return chrF2 of the corpus. ``sums``: (n, 18), the statistics that sacrebleu adds over rows."""
    return _corpus_scores(chrf_scorer(), sums)


def _corpus_scores(scorer: BLEU | CHRF, sums: np.ndarray) -> np.ndarray:
    return np.array([scorer._compute_score_from_stats([int(one) for one in row]).score for row in sums])


FUNCTIONS: dict[str, OfSums] = {
    one.__name__: one
    for one in (
        *(ratio, exponential, root, macro_f1, macro_f1_of_all, calibration_error, r2, pearson),
        *(bleu, chrf),
    )
}
"""The functions by name."""
BIASED = frozenset({calibration_error})
"""Functions that are too high on a sample, and higher still on a bootstrap draw of it: chance alone makes a gap
in every bin. Their interval is the basic bootstrap's, which takes the bias off."""


def _divide(above: np.ndarray, below: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, otherwise), where=below != 0)
