"""Linear layers, plain, with LoRA or with (IA)^3, as one matrix product: the parts of the fused layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tunesmith.models.adapters import ia3_layers, lora_factors
from tunesmith.models.fast import fused_bottleneck, kernels
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.self_check import Forward
from tunesmith.models.load import dequantized_linear
from tunesmith.models.network import attribute, has_attributes


class Projection(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T: x (tokens, in), W (out, in), A (r, in), B (out, r) with the LoRA scaling.

    Hu et al. 2021, equation 3. ``weights`` are the parameters whose rows, stacked, are W.
    """

    @staticmethod
    def forward(
        ctx: Context[tuple[int, list[int]]],
        x: Tensor,
        stacked: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.kept = x.shape[1], [weight.shape[0] for weight in weights]
        if a is not None and b is not None:
            # one product over (x, x A^T): added to a y rounded to bf16, most of a small update would be lost
            x, stacked_b = torch.cat([x, x @ a.t()], dim=1), torch.cat([stacked, b], dim=1)
            y = nn.functional.linear(x, stacked_b, bias)
        else:
            y = nn.functional.linear(x, stacked, bias)
        keep_x = a is not None or any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if keep_x else None, stacked, a, b)
        return y

    @staticmethod
    def backward(ctx: Context[tuple[int, list[int]]], grad: Tensor) -> Gradients:
        x, stacked, a, b = ctx.saved_tensors
        width, rows = ctx.kept
        if x is not None:
            x, low = x[:, :width], x[:, width:]
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ stacked if need_x else None
        grad_a = grad_b = None
        if a is not None:
            grad_low = grad @ b
            grad_a, grad_b = grad_low.t() @ x, grad.t() @ low
            if grad_x is not None:
                grad_x.addmm_(grad_low, a)
        needed = ctx.needs_input_grad[5:]
        parts = (grad.t() @ x).split(rows) if any(needed) else (None,) * len(rows)
        grad_weights = [part if need else None for part, need in zip(parts, needed, strict=True)]
        return grad_x, None, _sum_of_rows(grad) if need_bias else None, grad_a, grad_b, *grad_weights


def _sum_of_rows(grad: Tensor) -> Tensor:
    """(tokens, out) -> (out,), summed in fp32."""
    if not kernels.available(grad):
        return grad.sum(0)
    sums = torch.empty(grad.shape[1], dtype=torch.float32)
    kernels.call("column_sums", grad.dtype, grad.contiguous(), sums, grad.shape[0], grad.shape[1])
    return sums.to(grad.dtype)


@dataclass
class StackedLinears:
    """One or more linear layers over the same input, plain or with LoRA, as a single product.

    ``stacked``: their weights; None for 4-bit and 8-bit bases, which are dequantised when they are needed.
    """

    bases: list[nn.Linear]
    loras: list[lora_factors.Factors | None]
    stacked: Tensor | None
    scales: ia3_layers.Scales

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, sum of out)."""
        x = self.scales.before(x)
        a = b = None
        downs = [lora.down() for lora in self.loras if lora is not None]
        if downs:
            a = downs[0] if len(downs) == 1 else torch.cat(downs)
            b = self._block_b()
        bias = None
        if any(base.bias is not None for base in self.bases):
            biases = (
                x.new_zeros(base.out_features) if base.bias is None else base.bias for base in self.bases
            )
            bias = torch.cat(list(biases))
        y: Tensor
        if self.stacked is None:
            y = dequantized_linear.Product.apply(x, self.bases, bias, a, b)
        else:
            y = Projection.apply(x, self.stacked, bias, a, b, *[base.weight for base in self.bases])
        return self.scales.after(y, [base.out_features for base in self.bases])

    def _block_b(self) -> Tensor:
        """(sum of out, sum of r): each layer's B, times its scaling, at its own rows and columns."""
        if len(self.bases) == 1 and self.loras[0] is not None:
            return self.loras[0].up()
        pairs = zip(self.bases, self.loras, strict=True)
        blocks = [
            base.weight.new_zeros(base.out_features, 0) if lora is None else lora.up() for base, lora in pairs
        ]
        return torch.block_diag(*blocks)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) -> (..., sum of out); further arguments of a layer's forward change nothing."""
        dtype = attribute(self.bases[0], "compute_dtype") if self.stacked is None else self.stacked.dtype
        return self(x.reshape(-1, x.shape[-1]).to(dtype)).view(*x.shape[:-1], -1)


def is_lora(module: nn.Module) -> bool:
    return has_attributes(module, "lora_A", "base_layer")


def stack_linears(modules: Sequence[nn.Module]) -> StackedLinears | None:
    """Return the layers as one product; None unless each is linear, plain or with one LoRA or vector."""
    bases: list[nn.Linear] = []
    loras: list[lora_factors.Factors | None] = []
    scales = ia3_layers.read(modules)
    if scales is None:
        return None
    for module in modules:
        adapted = is_lora(module) or ia3_layers.is_scaled(module)
        base = attribute(module, "base_layer") if adapted else cast(nn.Linear, module)
        lora = lora_factors.read(module) if is_lora(module) else None
        if is_lora(module) and lora is None:
            return None
        if type(base) is not nn.Linear and not dequantized_linear.is_layer(base):
            return None
        bases.append(base)
        loras.append(lora)
    if len({(base.in_features, base.weight.dtype, base.weight.device) for base in bases}) != 1:
        return None
    if dequantized_linear.is_layer(bases[0]):
        return StackedLinears(bases, loras, None, scales)
    if len(bases) == 1:
        return StackedLinears(bases, loras, bases[0].weight.detach(), scales)
    stacked = torch.cat([base.weight.detach() for base in bases])
    for base, rows in zip(bases, stacked.split([base.out_features for base in bases]), strict=True):
        base.weight.data = rows  # equal values, now a view: optimiser and checkpoints see no difference
    return StackedLinears(bases, loras, stacked, scales)


def output_forward(module: nn.Module) -> Forward | None:
    """Return a forward of a linear layer, plain or with a LoRA or bottleneck; None for other layers."""
    if fused_bottleneck.is_bottleneck(module):
        return fused_bottleneck.projection(module)
    linear = stack_linears([module])
    return None if linear is None else linear.forward
