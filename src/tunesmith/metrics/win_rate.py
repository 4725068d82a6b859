"""Win rate of one system over another from pairwise verdicts, plain and controlled for length.

A judge that likes long answers gives a win rate that a system can raise by writing more. The length-controlled
win rate (Dubois et al. 2024, arXiv:2404.04475, equation 2) fits

    P(second wins) = sigmoid(a + b * tanh((words of second - words of first) / standard deviation))

to the verdicts and reports sigmoid(a): the win rate between answers of equal length. Their term for the
difficulty of a prompt needs verdicts on many systems, so it is left out. If length separates wins from losses,
the maximum-likelihood b is infinite; a normal prior on b keeps it finite, as theirs does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from tunesmith.metrics import comparison
from tunesmith.metrics.intervals import LEVEL, Interval

FEWEST = 20
"""Verdicts that a fit with length needs: ten for each of its two numbers."""
PRIOR_DEVIATION = 5.0
"""Standard deviation of b in the prior: b = 5 moves a win rate from 50% to 98% at a difference of one
standard deviation."""
DRAWS = 300


def win_rate(wins: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval | None:
    """Return the share of verdicts for the second system with its interval.

    ``wins``: 1 = the second won, 0 = the first, 0.5 = a tie. None for fewer than two clusters.
    """
    terms = np.stack([np.asarray(wins, float), np.ones(len(wins))], axis=1)
    found = comparison.interval(terms, clusters)
    if found is None:
        return None
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high), found.rows)


def length_controlled(wins: Sequence[float], longer: Sequence[float]) -> tuple[Interval | None, str]:
    """Return the win rate between answers of equal length, and a sentence on what was done.

    ``longer``: length of the second answer minus that of the first, in words. The interval is that of a
    bootstrap over rows. None if there are fewer than ``FEWEST`` verdicts, or if ``longer`` is the same in all
    rows, so that length cannot be told from quality.
    """
    from scipy.special import expit

    won, gap = np.asarray(wins, float), np.asarray(longer, float)
    if len(won) < FEWEST:
        return None, f"no length-controlled win rate: {len(won)} verdicts, at least {FEWEST} are needed"
    spread = float(gap.std())
    if not spread:
        return None, "no length-controlled win rate: the lengths differ by the same amount in all rows"
    feature = np.tanh(gap / spread)
    a, b = _fit(won, feature)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        rows = generator.integers(0, len(won), len(won))
        drawn.append(expit(_fit(won[rows], feature[rows])[0]))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    sentence = (
        f"an answer longer by one standard deviation ({spread:.0f} words) has {_odds(b)} the odds to win"
    )
    if _separable(won, feature):
        sentence += (
            "; length alone explains every verdict, so the length-controlled win rate depends on the prior"
        )
    return Interval(float(expit(a)), float(low), float(high), len(won)), sentence


def _odds(slope: float) -> str:
    return f"{np.exp(slope * np.tanh(1.0)):.2g} times"


def _separable(won: np.ndarray, feature: np.ndarray) -> bool:
    """Return whether some length difference has all wins on one side and all losses on the other."""
    wins, losses = feature[won > 0.5], feature[won < 0.5]
    if not len(wins) or not len(losses):
        return False
    return bool(wins.min() > losses.max() or wins.max() < losses.min())


def _fit(won: np.ndarray, feature: np.ndarray) -> tuple[float, float]:
    """Return (a, b) of the most probable fit.

    Half a win and half a loss at equal length are added, so that a is finite when one system wins always."""
    from scipy.optimize import minimize
    from scipy.special import expit

    def cost(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = parameters
        scores = a + b * feature
        loss = np.logaddexp(0, scores) - won * scores
        prior = (b / PRIOR_DEVIATION) ** 2 / 2 + np.logaddexp(0, a) - 0.5 * a
        error = expit(scores) - won
        slopes = [error.sum() + expit(a) - 0.5, error @ feature + b / PRIOR_DEVIATION**2]
        return float(loss.sum() + prior), np.array(slopes)

    found = minimize(cost, np.zeros(2), jac=True, method="BFGS")
    return float(found.x[0]), float(found.x[1])
