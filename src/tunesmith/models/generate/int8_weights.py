"""Weights rounded to int8 for decoding, in plain torch: what the C step must compute with its int8 copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127
"""Symmetric: -128 is not used, so that 0 stays 0."""
OUTPUTS = 1024
"""Outputs of a matrix that are rounded at a time: a whole head of 49,152 took 470 MB."""


def rounded_to_int8(weight: Tensor) -> Tensor:
    """Return ``weight`` (out, in) rounded to int8 with one scale for each output, as numbers of its dtype.

    A number changes by at most half a scale, 1/254 of the largest number of its output.
    """
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True) / LARGEST
    steps = torch.where(scale > 0, exact / scale, 0.0).round()
    return (steps * scale).to(weight.dtype)


@contextmanager
def int8_forward(linears: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``linears`` multiply by their weights rounded to int8 inside the ``with`` block, a part at a time."""

    def multiply(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        parts = linear.weight.split(OUTPUTS)
        product = torch.cat([functional.linear(inputs[0], rounded_to_int8(part)) for part in parts], dim=-1)
        return product if linear.bias is None else product + linear.bias

    hooks = [linear.register_forward_hook(multiply) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
