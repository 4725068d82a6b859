"""Linear layers that bitsandbytes keeps in 4 or 8 bits, computed with their de-quantised weights.

Each product de-quantises the weight and drops it, in forward and again in backward; only the input is kept
between them. LLM.int8() (Dettmers et al. 2022) is not used for 8-bit layers: it also rounds the inputs, by a
rule that looks at all rows of a batch, so that a row's result would depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from tunesmith.models.network import quant_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QuantizedLinear: TypeAlias = Any
"""bitsandbytes' Linear4bit or Linear8bitLt, which have no types."""


def is_layer(module: torch.nn.Module) -> bool:
    """Return whether ``module`` is bitsandbytes' linear layer. peft's wrappers have the same class names."""
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def dequantize(layer: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight (out, in). 4 bits are de-quantised to the dtype of :func:`compute_in` first."""
    weight = layer.weight
    if (state := quant_state(weight)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(dtype)
    scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    return weight.data.to(dtype).mul_(scale[:, None] * (1 / 127))


class Product(torch.autograd.Function):
    """``models.fast.linear_products.Projection`` for stacked ``layers`` of 4 or 8 bits.

    y = x W^T + b + (x A^T) B^T with x (tokens, in), W (sum of out, in), A (r, in), B (out, r) with its
    scaling. W gets no gradient; it is made twice and never kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[QuantizedLinear],
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.layers, ctx.width = layers, x.shape[1]
        if a is not None and b is not None:
            x = torch.cat([x, x @ a.t()], dim=1)  # one product, as in Projection
        ctx.save_for_backward(x if a is not None else None, a, b)
        return torch.nn.functional.linear(x, _stacked_weights(layers, x.dtype, b), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        grad_x = grad @ _stacked_weights(ctx.layers, grad.dtype, None) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        if a is not None:
            grad_low = grad @ b
            low = x[:, ctx.width :].t().contiguous()
            grad_a, grad_b = grad_low.t() @ x[:, : ctx.width], (low @ grad).t()  # as in Projection
            if grad_x is not None:
                grad_x.addmm_(grad_low, a)
        return grad_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, grad_a, grad_b


def _stacked_weights(
    layers: Sequence[QuantizedLinear], dtype: torch.dtype, right: torch.Tensor | None
) -> torch.Tensor:
    """Return the weights of all layers (sum of out, in), with ``right`` (sum of out, r) to their right."""
    weights = [dequantize(layer, dtype) for layer in layers]
    if right is None:
        return weights[0] if len(weights) == 1 else torch.cat(weights)
    width = weights[0].shape[1]
    stacked = weights[0].new_empty(right.shape[0], width + right.shape[1])
    stacked[:, width:] = right
    for weight, rows in zip(weights, stacked.split([len(weight) for weight in weights])):
        rows[:, :width] = weight
    return stacked


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let 4-bit and 8-bit layers compute in ``dtype``, with and without gradients. Their bits stay."""
    for module in model.modules():
        if not is_layer(module):
            continue
        module.compute_dtype = dtype
        if (state := quant_state(module.weight)) is not None:
            state.dtype = dtype
            module.compute_type_is_set = True
            # else an evaluation repacks the weights, with scales rounded to bf16
            module.support_avx512bf16_for_cpu = False
        else:
            module.forward = _forward_of(module)


def _forward_of(layer: QuantizedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(layer.compute_dtype)
        y: torch.Tensor = Product.apply(rows, [layer], layer.bias, None, None)
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    return forward
