"""LoRA layers read as two factors, and LoRA layers whose update is counted from their start values.

A LoRA that starts from the base's own weights (PiSSA, OLoRA) usually changes the base to W - s B0 A0, so that
the sum with s B A starts as W. Here the base is unchanged: y = W x + s (B A - B0 A0) x. The trained
parameters are the changes dA = A - A0 and dB = B - B0, which start at zero; their gradients are those of A
and B. The update is computed as dB A + B0 dA, never as a difference of two large products, in which bf16
would lose everything that was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.models.network import attribute

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

ADAPTER = "default"

TOLERANCE = 1e-3
"""Share of a factor's norm: more than rounding changes a start, less than rotated or negated vectors do."""


class OffsetLora:
    """A variant of peft's LoRA forward, for factors that are changes of ``start_A`` and ``start_B``.

    The starts are fp32 buffers, (r, in) and (out, r), that no checkpoint holds: a resumed run computes them
    from the base again and checks their :func:`start_sketch`.
    """

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """Return ``result`` + s (B A d(x) - B0 A0 x). The dropout d applies to the trained part alone."""
        change_a, change_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        start_a, start_b = module.start_A.to(change_a.dtype), module.start_B.to(change_a.dtype)
        dropped = module.lora_dropout[active_adapter](x)
        linear = nn.functional.linear
        update = linear(linear(dropped, start_a + change_a), change_b)
        update = update + linear(linear(dropped, change_a), start_b)
        if dropped is not x:
            update = update + linear(linear(dropped - x, start_a), start_b)
        return result + update * module.scaling[active_adapter]


def set_start(module: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Make the LoRA layer ``module`` start at ``a`` (r, in) and ``b`` (out, r), with an update of zero."""
    module.register_buffer("start_A", a, persistent=False)
    module.register_buffer("start_B", b, persistent=False)
    module.lora_variant[ADAPTER] = OffsetLora()
    with torch.no_grad():
        module.lora_A[ADAPTER].weight.zero_()
        module.lora_B[ADAPTER].weight.zero_()


def started_layers(model: PreTrainedModel) -> dict[str, LoraLayer]:
    """Return the layers of ``model`` that have a start (:func:`set_start`), by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(attribute(module, "start_A"), Tensor)}


@torch.no_grad()
def start_sketch(model: PreTrainedModel) -> dict[str, list[float]]:
    """Return u^T A v, with u and v fixed, and the norm of A, of each layer's start A; the same of its B.

    They are equal up to rounding for equal starts, and differ for rotated or negated vectors.
    """
    layers = started_layers(model).items()
    return {name: [*_sketch(layer.start_A), *_sketch(layer.start_B)] for name, layer in layers}


def _sketch(factor: Tensor) -> tuple[float, float]:
    rows, columns = (torch.arange(1.0, size + 1, device=factor.device).cos() for size in factor.shape)
    return float(rows @ factor.float() @ columns), float(factor.float().norm())


def changed_start(model: PreTrainedModel, before: Mapping[str, list[float]]) -> str | None:
    """Return the first layer of ``model`` whose start differs from a :func:`start_sketch`, or None."""
    for name, (a, norm_a, b, norm_b) in start_sketch(model).items():
        now, norms = (a, norm_a, b, norm_b), (norm_a, norm_a, norm_b, norm_b)
        then = before.get(name, now)
        if any(abs(x - y) > TOLERANCE * max(norm, 1e-30) for x, y, norm in zip(now, then, norms)):
            return name
    return None


@dataclass(frozen=True)
class Factors:
    """The LoRA of a linear layer, ``a`` (r, in) and ``b`` (out, r). With ``start`` they are changes of it."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    start: tuple[Tensor, Tensor] | None = None

    def down(self) -> Tensor:
        """(r, in), or with a start (2 r, in): the first factor."""
        return self.a if self.start is None else torch.cat([self.start[0] + self.a, self.a]).to(self.a.dtype)

    def up(self) -> Tensor:
        """(out, r), or with a start (out, 2 r): the second factor, scaling included."""
        if self.start is None:
            return self.b * self.scaling
        return torch.cat([self.b, self.start[1].to(self.b.dtype)], dim=1) * self.scaling


def read(module: LoraLayer) -> Factors | None:
    """Return the LoRA of a layer; None unless it is one active pair of factors, no dropout, bias or DoRA."""
    names = list(module.active_adapters)
    if len(names) != 1 or names[0] not in module.lora_A or module.disable_adapters:
        return None
    plain = type(module.lora_dropout[names[0]]) is nn.Identity
    return read_adapter(module, names[0]) if plain else None


def read_adapter(module: LoraLayer, name: str) -> Factors | None:
    """Return the LoRA ``name`` of a layer, without its dropout; None for a merged one, a bias or DoRA."""
    variant, a, b = module.lora_variant.get(name), module.lora_A[name], module.lora_B[name]
    if module.merged or (variant is not None and type(variant) is not OffsetLora):
        return None
    if a.bias is not None or b.bias is not None:
        return None
    start = None if variant is None else (module.start_A, module.start_B)
    return Factors(a.weight, b.weight, float(module.scaling[name]), start)
