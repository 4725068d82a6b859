"""The KL divergence of policy and reference, estimated from the tokens that the policy sampled, and the
coefficient that weighs it.

With r = log policy(token) - log reference(token): Schulman 2020, "Approximating KL divergence"
(joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """r: unbiased, of either sign, and of high variance."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """r^2 / 2: biased, never negative, and of low variance. Its gradient is that of the KL divergence."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-r) - 1 + r: unbiased and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    estimator.__name__: estimator for estimator in (k1, k2, k3)
}
"""log (policy / reference) of each token -> its estimate of the KL divergence, of the same shape."""

MOST_ERROR = 0.2
"""The error of one update of the coefficient is clipped to this (Ziegler et al. 2019, section 2.2)."""


@dataclass(frozen=True)
class KlController:
    """The coefficient of the KL penalty: fixed, or adapted to a target (Ziegler et al. 2019, section 2.2).

    ``target``: KL divergence of a whole answer; None = fixed. ``horizon``: answers over which an error of the
    KL is corrected.
    """

    target: float | None
    horizon: float

    def update(self, coefficient: float, kl: float, answers: int) -> float:
        """Return the next coefficient, after ``answers`` answers with the mean divergence ``kl``.

        e = clip(kl / target - 1, -0.2, 0.2); coefficient * (1 + e * answers / horizon)."""
        if self.target is None:
            return coefficient
        error = min(max(kl / self.target - 1, -MOST_ERROR), MOST_ERROR)
        return coefficient * (1 + error * answers / self.horizon)
