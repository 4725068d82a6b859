"""Losses of each sampled token that keep a policy, and its value model, near the one that sampled it.

PPO, Schulman et al. 2017 (arXiv:1707.06347). All arguments are tensors (tokens,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A), equation 7.

    ``ratio``: policy(token) / policy(token) when the token was sampled. ``clip_range_high``: another range
    above 1 (Yu et al. 2025, arXiv:2503.14476, section 3.1); None = ``clip_range``."""
    above = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + above)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """Return 1 for each token whose gradient the clipping of :func:`clipped_surrogate` removes, else 0."""
    above = clip_range if clip_range_high is None else clip_range_high
    outside = torch.where(advantages > 0, ratio > 1 + above, ratio < 1 - clip_range)
    return (outside & (advantages != 0)).to(ratio)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range_value: float | None
) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2; without a clip range (V - R)^2 / 2.

    The clipping is that of OpenAI's Baselines; the factor 1/2 that of TRL."""
    squared = (values - returns) ** 2
    if clip_range_value is not None:
        near = old_values + (values - old_values).clamp(-clip_range_value, clip_range_value)
        squared = torch.maximum(squared, (near - returns) ** 2)
    return squared / 2
