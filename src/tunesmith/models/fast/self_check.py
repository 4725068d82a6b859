"""Whether a replaced forward gives what the module's own gives: tried on a small random input before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the output's norm


@torch.no_grad()
def equal(
    kind: str,
    module: Any,
    forward: Callable[..., Any],
    dtype: torch.dtype,
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> bool:
    """Whether the new forward gives what the module's own gives, on ``given`` arguments or a small random input of ``dtype``."""
    if given is not None:
        arguments, named = given
        ours, theirs = (
            one[0] if isinstance(one, tuple) else one
            for one in (forward(*arguments, **named), type(module).forward(module, *arguments, **named))
        )
        return _near(ours, theirs, dtype)
    linear = next((one for one in module.modules() if hasattr(one, "in_features")), None)
    width = module.weight.shape[-1] if linear is None else linear.in_features
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, width, generator=generator).to(dtype)
    if kind == "attention":
        angle = torch.randn(1, 8, module.head_dim // 2, generator=generator)
        table = torch.cat([angle, angle], dim=-1)
        keywords: dict[str, Any] = {
            "position_embeddings": (table.cos().to(dtype), table.sin().to(dtype)),
            "attention_mask": None,
            "segments": (5, 3),
        }
        ours, theirs = forward(x, **keywords)[0], type(module).forward(module, x, **keywords)[0]
    else:
        ours, theirs = forward(x), type(module).forward(module, x)
    return _near(ours, theirs, dtype)


def _near(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-6)
    return bool((difference <= TOLERANCE[dtype]).item())
