"""A problem with known answers: answers of one token, a fixed reward for each token, and the KL divergence from a reference.

KL in the reward. maximise sum pi (r - beta log (pi / ref)) with sum pi = 1 (multiplier m): r - beta log (pi / ref) - beta - m = 0, so
pi = ref exp(r / beta) / Z.

k3 in the loss, of tokens that the policy sampled. A token's term is k3 = ref / pi - 1 - log (ref / pi); its gradient by the logits of the
policy is (1 - ref / pi) grad log pi, and the mean over pi is sum (pi - ref) grad log pi = -sum ref grad log pi = grad KL(ref, pi). So the
policy maximises sum pi r - beta KL(ref, pi) = sum pi r + beta sum ref log pi + constant: r + beta ref / pi = m, pi = beta ref / (m - r), and
m > max r normalises.
"""

from __future__ import annotations

import torch

REWARDS = torch.tensor([0.0, 0.2, 0.4, 0.7, 1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.3, 0.2, 0.15, 0.05], dtype=torch.float64)
BETA = 0.2

KL_IN_REWARD = torch.softmax(REFERENCE.log() + REWARDS / BETA, 0)


def normalised() -> torch.Tensor:
    """beta ref / (m - r): bisection for m, since the sum falls with m."""
    low, high = float(REWARDS.max()) + 1e-9, float(REWARDS.max()) + 10
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((BETA * REFERENCE / (middle - REWARDS)).sum()) > 1 else (low, middle)
    return BETA * REFERENCE / (low - REWARDS)


KL_IN_LOSS = normalised()


def nats(policy: torch.Tensor, answer: torch.Tensor) -> float:
    """KL(policy, answer)."""
    return float((policy * (policy / answer).log()).sum())
