"""Linear layers with (IA)^3 vectors, read so that one product can compute several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.models.network import has_attributes

if TYPE_CHECKING:
    from peft.tuners.ia3 import IA3Layer


@dataclass(frozen=True)
class Scales:
    """The vectors that scale the input of a product (in,) and the output of each layer (out,), or None."""

    inner: nn.Parameter | None
    outer: list[nn.Parameter | None]

    def before(self, x: Tensor) -> Tensor:
        """Scale the input x (tokens, in)."""
        return x if self.inner is None else x * self.inner.flatten().to(x.dtype)

    def after(self, y: Tensor, widths: Sequence[int]) -> Tensor:
        """Scale each layer's part of the output y (tokens, sum of ``widths``)."""
        if all(vector is None for vector in self.outer):
            return y
        parts = [
            y.new_ones(width) if vector is None else vector.flatten().to(y.dtype)
            for vector, width in zip(self.outer, widths, strict=True)
        ]
        return y * torch.cat(parts)


def is_scaled(module: nn.Module) -> bool:
    """Return whether peft has put an (IA)^3 vector on this layer."""
    return has_attributes(module, "ia3_l", "base_layer")


def read(modules: Sequence[IA3Layer]) -> Scales | None:
    """Return the vectors of layers over one input, or None where they cannot be read with certainty."""
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
