"""An output projection and its bottleneck adapter as one matrix product, without rounding between the two.

y = W x + b and y + U act(D y + d) + u equal [W, U] [x; act((D W) x + D b + d)] + b + u: the adapter is
computed from x, and the product itself sums its update. Added to a y rounded to bf16, an update below half a
unit in the last place would be lost; U starts at zero, so at first all of it. D W costs as much as a few
hundred tokens, and autograd computes the gradients of D through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.self_check import Forward
from tunesmith.models.network import has_attributes

if TYPE_CHECKING:
    from tunesmith.models.adapters.bottleneck_tuner import BottleneckLayer

FEW = 256
"""Tokens below which, without gradients, there are two products: D W would cost more (generation)."""


class Appended(torch.autograd.Function):
    """y = [x, a] [W, U]^T + b: x (tokens, in), a (tokens, size), frozen W (out, in), U (out, size), b (out,)
    or None."""

    @staticmethod
    def forward(
        ctx: Context[None], x: Tensor, a: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(a, weight, up)
        return nn.functional.linear(torch.cat([x, a], dim=1), torch.cat([weight, up], dim=1), bias)

    @staticmethod
    def backward(ctx: Context[None], grad: Tensor) -> Gradients:
        a, weight, up = ctx.saved_tensors
        need_x, need_a, _, need_up, need_bias = ctx.needs_input_grad
        return (
            grad @ weight if need_x else None,
            grad @ up if need_a else None,
            None,
            grad.t() @ a if need_up else None,
            grad.sum(0) if need_bias else None,
        )


def is_bottleneck(module: nn.Module) -> TypeGuard[BottleneckLayer]:
    return has_attributes(module, "bottleneck_up", "base_layer")


def projection(layer: BottleneckLayer) -> Forward | None:
    """Return a forward of ``layer``, (..., in) -> (..., out); None unless its base is linear and frozen.

    Each call looks up which adapter is active, if any.
    """
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or base.weight.requires_grad:
        return None

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        names = [name for name in layer.active_adapters if name in layer.bottleneck_up]
        few = x.numel() < FEW * x.shape[-1] and not torch.is_grad_enabled()
        if few or layer.disable_adapters or len(names) != 1:
            return type(layer).forward(layer, x)
        down, up = layer.bottleneck_down[names[0]], layer.bottleneck_up[names[0]]
        if not up.weight.dtype == x.dtype == base.weight.dtype:
            return type(layer).forward(layer, x)
        weight = base.weight.detach()
        weight = weight if type(base) is nn.Linear else weight.t()  # gpt2's is (in, out)
        shift = down.bias if base.bias is None else down.bias + down.weight @ base.bias
        low = layer.activation(names[0])(nn.functional.linear(x, down.weight @ weight, shift))
        low = layer.bottleneck_dropout[names[0]](low)
        bias = up.bias if base.bias is None else up.bias + base.bias
        y = Appended.apply(x.flatten(0, -2), low.flatten(0, -2), weight, up.weight, bias)
        return y.view(*x.shape[:-1], -1)

    return forward
