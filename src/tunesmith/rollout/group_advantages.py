"""Advantages of answers that are compared with the other answers to their prompt, without a value model.

The arguments are the scores of ``K`` answers to each prompt, float64 (prompts, K); so is the result. Every
token of an answer has the answer's advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""

NO_DIFFERENCE = 1e-8
"""Scores of a group that differ by less, relative to their size, are equal: all its advantages are 0."""


def grpo(scores: np.ndarray) -> np.ndarray:
    """(r - mean) / std over the answers to a prompt (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    The standard deviation has K - 1 in its denominator, as in TRL."""
    centred = dr_grpo(scores)
    return centred / (np.sqrt((centred**2).sum(axis=1, keepdims=True) / (scores.shape[1] - 1)) + EPSILON)


def dr_grpo(scores: np.ndarray) -> np.ndarray:
    """r - mean (Liu et al. 2025, arXiv:2503.20783): the division by std would weigh a prompt more, the more
    its answers agree."""
    return scores - scores.mean(axis=1, keepdims=True)


def rloo(scores: np.ndarray) -> np.ndarray:
    """r - mean of the other answers (Ahmadian et al. 2024, arXiv:2402.14740): K / (K - 1) (r - mean)."""
    answers = scores.shape[1]
    return dr_grpo(scores) * (answers / (answers - 1))


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    function.__name__: function for function in (grpo, rloo, dr_grpo)
}


def without_variance(scores: np.ndarray) -> np.ndarray:
    """bool (prompts,): all answers to the prompt have the same score, so their advantages are zero."""
    spread = scores.max(axis=1) - scores.min(axis=1)
    return np.asarray(spread <= NO_DIFFERENCE * np.maximum(1.0, np.abs(scores).max(axis=1)))
