"""Linear layers, plain, with LoRA or scaled, as one matrix product: what the fused layers are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunesmith.models.adapters import ia3_layers, lora_factors
from tunesmith.models.fast import fused_bottleneck, kernels
from tunesmith.models.load import dequantized_linear


class Projection(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for x (tokens, in), W (out, in), A (r, in), B (out, r); B carries the LoRA scaling.

    Hu et al. 2021, equation 3. ``weights`` are the parameters whose rows, stacked, are W; they get slices of its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stacked: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.width = x.shape[1]
        if a is not None and b is not None:
            # one product over (x, x A^T): were the update added to a y already rounded to bf16, most of a small one would be lost
            x = torch.cat([x, x @ a.t()], dim=1)
            y = torch.nn.functional.linear(x, torch.cat([stacked, b], dim=1), bias)
        else:
            y = torch.nn.functional.linear(x, stacked, bias)
        ctx.rows = [weight.shape[0] for weight in weights]
        keep_x = a is not None or any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if keep_x else None, stacked, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, stacked, a, b = ctx.saved_tensors
        if x is not None:
            x, low = x[:, : ctx.width], x[:, ctx.width :]
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ stacked if need_x else None
        grad_a = grad_b = None
        if a is not None:
            grad_low = grad @ b
            grad_a, grad_b = grad_low.t() @ x, grad.t() @ low
            if grad_x is not None:
                grad_x.addmm_(grad_low, a)
        grad_weights: Sequence[torch.Tensor | None] = [None] * len(ctx.rows)
        if any(ctx.needs_input_grad[5:]):
            grad_weights = [
                part if needed else None
                for part, needed in zip((grad.t() @ x).split(ctx.rows), ctx.needs_input_grad[5:], strict=True)
            ]
        return grad_x, None, _sum_of_rows(grad) if need_bias else None, grad_a, grad_b, *grad_weights


def _sum_of_rows(grad: torch.Tensor) -> torch.Tensor:
    """(tokens, out) -> (out,), summed in fp32."""
    if not kernels.available(grad):
        return grad.sum(0)
    sums = torch.empty(grad.shape[1], dtype=torch.float32)
    kernels.call("column_sums", grad.dtype, grad.contiguous(), sums, grad.shape[0], grad.shape[1])
    return sums.to(grad.dtype)


@dataclass
class Linears:
    """One or more linear layers over the same input, plain or with LoRA, read as a single product."""

    bases: list[nn.Linear]
    loras: list[lora_factors.Factors | None]
    stacked: torch.Tensor | None  # None for bases of 4 or 8 bits: their numbers are made when they are needed
    scales: ia3_layers.Scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, sum of out)."""
        x = self.scales.before(x)
        a = b = None
        if any(lora is not None for lora in self.loras):
            downs = [lora.down() for lora in self.loras if lora is not None]
            a = downs[0] if len(downs) == 1 else torch.cat(downs)
            b = self._block_b()
        biases = [base.bias for base in self.bases]
        bias = None
        if any(one is not None for one in biases):
            bias = torch.cat(
                [x.new_zeros(base.out_features) if base.bias is None else base.bias for base in self.bases]
            )
        y: torch.Tensor
        if self.stacked is None:
            y = dequantized_linear.Product.apply(x, self.bases, bias, a, b)
        else:
            y = Projection.apply(x, self.stacked, bias, a, b, *[base.weight for base in self.bases])
        return self.scales.after(y, [base.out_features for base in self.bases])

    def _block_b(self) -> torch.Tensor:
        """(sum of out, sum of r): each layer's B, times its scaling, at its own rows and columns."""
        if len(self.bases) == 1 and self.loras[0] is not None:
            return self.loras[0].up()
        pairs = zip(self.bases, self.loras, strict=True)
        blocks = [
            base.weight.new_zeros(base.out_features, 0) if lora is None else lora.up() for base, lora in pairs
        ]
        return torch.block_diag(*blocks)


def is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def linears(modules: Sequence[Any]) -> Linears | None:
    """The layers as one product, or None when any of them is something else than a linear layer with one plain LoRA or vector."""
    bases: list[nn.Linear] = []
    loras: list[lora_factors.Factors | None] = []
    scales = ia3_layers.read(modules)
    if scales is None:
        return None
    for module in modules:
        found = module.base_layer if is_lora(module) or ia3_layers.is_scaled(module) else module
        if type(found) is not nn.Linear and not dequantized_linear.is_layer(found):
            return None
        bases.append(found)
        if not is_lora(module):
            loras.append(None)
            continue
        lora = lora_factors.read(module)
        if lora is None:
            return None
        loras.append(lora)
    same = {(base.in_features, base.weight.dtype, base.weight.device) for base in bases}
    if len(same) != 1:
        return None
    if len(bases) == 1 or dequantized_linear.is_layer(bases[0]):
        return Linears(
            bases, loras, None if dequantized_linear.is_layer(bases[0]) else bases[0].weight.detach(), scales
        )
    stacked = torch.cat([base.weight.detach() for base in bases])
    for base, rows in zip(bases, stacked.split([base.out_features for base in bases]), strict=True):
        base.weight.data = (
            rows  # the same values, now a view of the stack: optimiser and checkpoints see no difference
        )
    return Linears(bases, loras, stacked, scales)


def output(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A sublayer's last product, (..., in) -> (..., out): a linear layer, plain, with LoRA or with a bottleneck adapter."""
    if fused_bottleneck.is_bottleneck(module):
        return fused_bottleneck.projection(module)
    linear = linears([module])
    return None if linear is None else forward_of(linear)


def forward_of(linear: Linears) -> Callable[..., Any]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype: Any = linear.bases[0].compute_dtype if linear.stacked is None else linear.stacked.dtype
        return linear(x.reshape(-1, x.shape[-1]).to(dtype)).view(*x.shape[:-1], -1)

    return forward
