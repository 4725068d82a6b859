"""An output projection and the bottleneck adapter on it as one matrix product, so that nothing is rounded between the two.

y = W x + b and y + U act(D y + d) + u are [W, U] [x; act((D W) x + D b + d)] + b + u: the adapter is computed from x, and its
update is summed with the product itself. Added to a y that is already rounded to bf16, an update below half a unit in y's last
place would be lost, always and everywhere: U starts at zero, so at first all of it is. D W costs as much as a few hundred tokens,
and gradients of D come out of autograd's own chain through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

FEW = 256
"""Tokens below which, without gradients, the two products are done one after the other: D W would cost more (generation)."""


class Appended(torch.autograd.Function):
    """y = [x, a] [W, U]^T + b for x (tokens, in), a (tokens, size), W (out, in) frozen, U (out, size), b (out,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        weight: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(a, weight, up)
        return nn.functional.linear(torch.cat([x, a], dim=1), torch.cat([weight, up], dim=1), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        a, weight, up = ctx.saved_tensors
        need_x, need_a, _, need_up, need_bias = ctx.needs_input_grad
        return (
            grad @ weight if need_x else None,
            grad @ up if need_a else None,
            None,
            grad.t() @ a if need_up else None,
            grad.sum(0) if need_bias else None,
        )


def is_bottleneck(module: Any) -> bool:
    return hasattr(module, "bottleneck_up") and hasattr(module, "base_layer")


def projection(layer: Any) -> Callable[..., Any] | None:
    """The function of a BottleneckLayer, (..., in) -> (..., out); None when its base is no plain frozen linear layer.

    Which adapter is active, and whether any is, is looked up at each call.
    """
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or base.weight.requires_grad:
        return None

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in layer.active_adapters if name in layer.bottleneck_up]
        few = x.numel() < FEW * x.shape[-1] and not torch.is_grad_enabled()
        if (
            few
            or layer.disable_adapters
            or len(names) != 1
            or not layer.bottleneck_up[names[0]].weight.dtype == x.dtype == base.weight.dtype
        ):
            return type(layer).forward(layer, x)
        down, up = layer.bottleneck_down[names[0]], layer.bottleneck_up[names[0]]
        weight = (
            base.weight.detach() if type(base) is nn.Linear else base.weight.detach().t()
        )  # gpt2's is (in, out)
        shift = down.bias if base.bias is None else down.bias + down.weight @ base.bias
        low = layer.activation(names[0])(nn.functional.linear(x, down.weight @ weight, shift))
        low = layer.bottleneck_dropout[names[0]](low)
        bias = up.bias if base.bias is None else up.bias + base.bias
        y = Appended.apply(x.flatten(0, -2), low.flatten(0, -2), weight, up.weight, bias)
        return y.view(*x.shape[:-1], -1)

    return forward
