"""Linear layers, plain, with LoRA or with (IA)^3, as one matrix product: the parts of the fused layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tunesmith.models.adapters import ia3_layers, lora_factors
from tunesmith.models.fast import fused_bottleneck, kernels, weight_gradients
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.self_check import Forward
from tunesmith.models.load import dequantized_linear
from tunesmith.models.network import attribute, has_attributes

Block = tuple[slice, slice]
"""The columns of y that a LoRA adds to, and its columns of x A^T."""


class Origin(NamedTuple):
    """A tensor that the backward pass keeps anyway, and the function that makes the input x from it again."""

    tensor: Tensor
    remake: Callable[[Tensor], Tensor]


Kept = tuple[Sequence[Tensor], Sequence[Block], Callable[[Tensor], Tensor] | None]
"""The weights of the stack, the block of each LoRA, and how x is made again from what is saved for it."""


class Projection(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T: x (tokens, in), W (out, in), A (r, in), B (out, r) with the LoRA scaling.

    Hu et al. 2021, equation 3. B is zero outside ``blocks``: ``others`` are the B of each LoRA, (out_i, r_i),
    then the parameters whose rows, stacked, are W. With an ``origin`` x is not kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Context[Kept],
        x: Tensor,
        stacked: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        blocks: Sequence[Block],
        origin: Origin | None,
        *others: Tensor,
    ) -> Tensor:
        ups, weights = others[: len(blocks)], others[len(blocks) :]
        ctx.kept = weights, blocks, origin and origin.remake
        # A x^T, (r, tokens): MKL takes up to six times as long for tall and narrow results as for flat ones
        low = None if a is None else a @ x.t()
        if low is not None and x.dtype.itemsize < 4:
            # one product over (x, x A^T): added to a y rounded to bf16, most of a small update would be lost
            both = torch.cat([stacked, block_matrix(blocks, ups, stacked.shape[0])], dim=1)
            y = nn.functional.linear(torch.cat([x, low.t()], dim=1), both, bias)
        else:
            y = nn.functional.linear(x, stacked, bias)
            for (columns, part), up in zip(blocks, ups, strict=True):
                y[:, columns].addmm_(cast(Tensor, low)[part].t(), up.t())
        read_x = a is not None or any(ctx.needs_input_grad[6:])
        kept = origin.tensor if origin else x
        ctx.save_for_backward(kept if read_x else None, stacked, a, low, *ups)
        return y

    @staticmethod
    def backward(ctx: Context[Kept], grad: Tensor) -> Gradients:
        x, stacked, a, low, *ups = ctx.saved_tensors
        weights, blocks, remake = ctx.kept
        if x is not None and remake is not None:
            x = remake(x)
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ stacked if need_x else None
        grad_a: Tensor | None = None
        grad_ups: list[Tensor] = []
        if a is not None:
            parts = [
                (grad[:, columns], low[part], up) for (columns, part), up in zip(blocks, ups, strict=True)
            ]
            grad_ups = [(low_part @ grad_part).t() for grad_part, low_part, _ in parts]
            grad_lows = [up.t() @ grad_part.t() for grad_part, _, up in parts]
            grad_low = grad_lows[0] if len(parts) == 1 else torch.cat(grad_lows)
            grad_a = grad_low @ x
            if grad_x is not None:
                grad_x.addmm_(grad_low.t(), a)
        needed = ctx.needs_input_grad[6 + len(blocks) :]
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if any(needed):
            grad_weights = weight_gradients.of_product(grad, x, weights, needed)
        grad_bias = _sum_of_rows(grad) if need_bias else None
        return grad_x, None, grad_bias, grad_a, None, None, *grad_ups, *grad_weights


def block_matrix(blocks: Sequence[Block], ups: Sequence[Tensor], out: int) -> Tensor:
    """Return B (out, sum of r): each of ``ups`` in its block, zeros elsewhere."""
    if len(ups) == 1 and ups[0].shape[0] == out:
        return ups[0]
    whole = ups[0].new_zeros(out, sum(up.shape[1] for up in ups))
    for block, up in zip(blocks, ups, strict=True):
        whole[block] = up
    return whole


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

    def __call__(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """(tokens, in) -> (tokens, sum of out). With an ``origin`` of x, the backward pass makes x again."""
        scaled = self.scales.before(x)
        origin, x = origin if scaled is x else None, scaled
        a, downs = None, [lora.down() for lora in self.loras if lora is not None]
        if downs:
            a = downs[0] if len(downs) == 1 else torch.cat(downs)
        ups = [lora.up() for lora in self.loras if lora is not None]
        blocks = self._blocks(ups)
        bias = None
        if any(base.bias is not None for base in self.bases):
            biases = (
                x.new_zeros(base.out_features) if base.bias is None else base.bias for base in self.bases
            )
            bias = torch.cat(list(biases))
        y: Tensor
        if self.stacked is None:
            b = block_matrix(blocks, ups, sum(base.out_features for base in self.bases)) if ups else None
            y = dequantized_linear.Product.apply(x, self.bases, bias, a, b)
        else:
            weights = [base.weight for base in self.bases]
            y = Projection.apply(x, self.stacked, bias, a, blocks, origin, *ups, *weights)
        return self.scales.after(y, [base.out_features for base in self.bases])

    def _blocks(self, ups: Sequence[Tensor]) -> list[Block]:
        """Return the block of each LoRA, whose B (with its scaling) is in ``ups``."""
        blocks: list[Block] = []
        row = column = 0
        remaining = iter(ups)
        for base, lora in zip(self.bases, self.loras, strict=True):
            if lora is not None:
                rank = next(remaining).shape[1]
                blocks.append((slice(row, row + base.out_features), slice(column, column + rank)))
                column += rank
            row += base.out_features
        return blocks

    def forward(self, x: Tensor, *args: object, origin: Origin | None = None, **kwargs: object) -> Tensor:
        """(..., in) -> (..., sum of out); further arguments of a layer's forward change nothing."""
        dtype = attribute(self.bases[0], "compute_dtype") if self.stacked is None else self.stacked.dtype
        return self(x.reshape(-1, x.shape[-1]).to(dtype), origin).view(*x.shape[:-1], -1)


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
