"""Linear layers with the vectors of (IA)^3 around them, read so that several can be served as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Scales:
    """What the input of a product is multiplied by, (in,) or None, and what each layer's output is, (its out,) or None."""

    inner: nn.Parameter | None
    outer: list[nn.Parameter | None]

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, in), scaled."""
        return x if self.inner is None else x * self.inner.flatten().to(x.dtype)

    def after(self, y: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """y (tokens, sum of ``widths``), each layer's part scaled."""
        if all(one is None for one in self.outer):
            return y
        parts = [
            y.new_ones(width) if one is None else one.flatten().to(y.dtype)
            for one, width in zip(self.outer, widths, strict=True)
        ]
        return y * torch.cat(parts)


def is_scaled(module: Any) -> bool:
    """Whether peft has put a vector of (IA)^3 on this layer."""
    return hasattr(module, "ia3_l") and hasattr(module, "base_layer")


def read(modules: Sequence[Any]) -> Scales | None:
    """The vectors of layers over one input, or None where one of them is not read with certainty."""
    inner: nn.Parameter | None = None
    outer: list[nn.Parameter | None] = []
    for module in modules:
        outer.append(None)
        if not is_scaled(module):
            continue
        names = list(module.active_adapters)
        if len(names) != 1 or module.merged or names[0] not in module.ia3_l or module.disable_adapters:
            return None
        if not module.is_feedforward:
            outer[-1] = module.ia3_l[names[0]]
        elif len(modules) == 1:
            inner = module.ia3_l[names[0]]
        else:
            return None
    return Scales(inner, outer)
