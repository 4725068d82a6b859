"""LoRA layers read as two factors, and those whose update is counted from where it started.

A LoRA that starts from the base's own weights (PiSSA, OLoRA) would change the base, so that W - s B0 A0 + s B A begins as W.
Here the base stays as it is: y = W x + s (B A - B0 A0) x, and what is trained is the change of the factors, dA = A - A0 and
dB = B - B0, which begin as zeros. The gradients are those of A and B. The update is computed as dB A + B0 dA, never as a
difference of two large products: in bf16 that would drown all that is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
STARTS = ("start_A", "start_B")
"""Buffers of a LoRA layer, (r, in) and (out, r) in fp32: where its factors started. They are no part of a checkpoint, since they
are computed from the base; of them a :func:`sketch` is kept."""

APART = 1e-3
"""Of a factor's norm: more than rounding does to a start, less than any other choice of its vectors or their signs."""


class Started:
    """The forward of a LoRA layer whose ``lora_A`` and ``lora_B`` hold changes of ``start_A`` and ``start_B``.

    It stands where peft keeps the variants of a layer, as DoRA does.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """``result`` + s (B A d(x) - B0 A0 x), where d is dropout: it falls on what is trained alone."""
        change_a, change_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        start_a, start_b = (getattr(module, name).to(change_a.dtype) for name in STARTS)
        dropped = module.lora_dropout[active_adapter](x)
        linear = nn.functional.linear
        update = linear(linear(dropped, start_a + change_a), change_b) + linear(
            linear(dropped, change_a), start_b
        )
        if dropped is not x:
            update = update + linear(linear(dropped - x, start_a), start_b)
        return result + update * module.scaling[active_adapter]


def start(module: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Let the LoRA layer ``module`` begin at the factors ``a`` (r, in) and ``b`` (out, r), in place; its update is then zero."""
    module.register_buffer("start_A", a, persistent=False)
    module.register_buffer("start_B", b, persistent=False)
    module.lora_variant[ADAPTER] = Started()
    with torch.no_grad():
        module.lora_A[ADAPTER].weight.zero_()
        module.lora_B[ADAPTER].weight.zero_()


def started(model: PreTrainedModel) -> dict[str, Any]:
    """The layers of ``model`` that :func:`start` was called on, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "start_A", None), torch.Tensor)
    }


@torch.no_grad()
def sketch(model: PreTrainedModel) -> dict[str, list[float]]:
    """Layer -> a number for each factor that it started from, u^T A v with u and v fixed, and the factor's norm. Nearly the same
    for nearly the same start, another for a start whose vectors are rotated or turned round; empty where nothing was started.
    """
    return {
        name: [number for part in STARTS for number in _sketch(getattr(layer, part))]
        for name, layer in started(model).items()
    }


def _sketch(factor: torch.Tensor) -> tuple[float, float]:
    rows, columns = (torch.arange(1.0, size + 1, device=factor.device).cos() for size in factor.shape)
    return float(rows @ factor.float() @ columns), float(factor.float().norm())


def moved(model: PreTrainedModel, before: Mapping[str, list[float]]) -> str | None:
    """The first layer of ``model`` that did not start where a :func:`sketch` says, or None."""
    for name, now in sketch(model).items():
        then = before.get(name, now)
        if any(
            abs(now[place] - then[place]) > APART * max(now[1 + place // 2 * 2], 1e-30) for place in range(4)
        ):
            return name
    return None


@dataclass(frozen=True)
class Factors:
    """The LoRA of one linear layer. ``a`` (r, in), ``b`` (out, r): its parameters; ``start``: what they are changes of."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    start: tuple[torch.Tensor, torch.Tensor] | None = None

    def down(self) -> torch.Tensor:
        """(r, in), or (2 r, in): what x is multiplied by first."""
        return self.a if self.start is None else torch.cat([self.start[0] + self.a, self.a]).to(self.a.dtype)

    def up(self) -> torch.Tensor:
        """(out, r), or (out, 2 r): what comes next, scaling included."""
        if self.start is None:
            return self.b * self.scaling
        return torch.cat([self.b, self.start[1].to(self.b.dtype)], dim=1) * self.scaling


def read(module: Any) -> Factors | None:
    """The one LoRA of a layer, or None where it is more than two factors (dropout, a bias, DoRA), or not one, or not in use."""
    names = list(module.active_adapters)
    if len(names) != 1 or module.merged or names[0] not in module.lora_A or module.disable_adapters:
        return None
    name = names[0]
    variant = module.lora_variant.get(name)
    plain = (
        type(module.lora_dropout[name]) is nn.Identity
        and (variant is None or type(variant) is Started)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
    )
    if not plain:
        return None
    begun = None if variant is None else (module.start_A, module.start_B)
    return Factors(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), begun)
