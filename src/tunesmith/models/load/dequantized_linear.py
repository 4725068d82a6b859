"""Linear layers whose weights are kept in 4 or 8 bits by bitsandbytes, computed with as plain products.

Each product makes the weight's numbers, uses them and lets them go, in forward and again in backward: between the two the input
alone is kept. 8-bit layers too are computed with the numbers that they stand for. LLM.int8() (Dettmers et al. 2022) rounds the
inputs besides, by a rule that looks at all rows of a batch: then a row's result would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_layer(module: Any) -> bool:
    """Whether a module is one of bitsandbytes' linear layers (peft's around them have the same names)."""
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (out, in) that a layer's bits stand for; those of 4 bits in the dtype of :func:`compute_in` first."""
    held = layer.weight
    if (state := getattr(held, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(held.data, state).to(dtype)
    scale = layer.state.SCB if layer.state.SCB is not None else held.SCB
    return held.data.to(dtype).mul_(scale[:, None] * (1 / 127))


class Product(torch.autograd.Function):
    """``models.fast.linear_products.Projection`` over ``layers`` of 4 or 8 bits, rows stacked: x (tokens, in) -> (tokens, sum of out).

    y = x W^T + b + (x A^T) B^T, A (r, in), B (out, r) with its scaling; W, which gets no gradient, is made twice and never kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[Any],
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.layers, ctx.width = layers, x.shape[1]
        if a is not None and b is not None:
            x = torch.cat([x, x @ a.t()], dim=1)  # one product, as Projection has it
        ctx.save_for_backward(x if a is not None else None, a, b)
        return torch.nn.functional.linear(x, _stacked(layers, x.dtype, b), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, a, b = ctx.saved_tensors
        grad_x = grad @ _stacked(ctx.layers, grad.dtype, None) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        if a is not None:
            grad_low = grad @ b
            grad_a, grad_b = grad_low.t() @ x[:, : ctx.width], grad.t() @ x[:, ctx.width :]
            if grad_x is not None:
                grad_x.addmm_(grad_low, a)
        return grad_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, grad_a, grad_b


def _stacked(layers: Sequence[Any], dtype: torch.dtype, beside: torch.Tensor | None) -> torch.Tensor:
    """(sum of out, in) of all layers; with ``beside`` (sum of out, r) at its right."""
    parts = [weight(layer, dtype) for layer in layers]
    if beside is None:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    width = parts[0].shape[1]
    whole = parts[0].new_empty(beside.shape[0], width + beside.shape[1])
    whole[:, width:] = beside
    at = 0
    for part in parts:
        whole[at : at + part.shape[0], :width] = part
        at += part.shape[0]
    return whole


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """From now on the network's layers of 4 or 8 bits compute in ``dtype``, in training and without gradients alike. No bit of
    what they keep changes.
    """
    for module in model.modules():
        if not is_layer(module):
            continue
        module.compute_dtype = dtype
        if (state := getattr(module.weight, "quant_state", None)) is not None:
            state.dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = (
                False  # else an evaluation repacks the weights, with scales rounded to bf16
            )
        else:
            module.forward = _forward(module)


def _forward(layer: Any) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Product.apply(
            x.reshape(-1, x.shape[-1]).to(layer.compute_dtype), [layer], layer.bias, None, None
        )
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    return forward
