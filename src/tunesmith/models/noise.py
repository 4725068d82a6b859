"""Dropout that depends on the seed, the step and the row, and on nothing else.

Torch draws dropout from one stream, so another split of the same step, another number of processes or a resumed run drops
something else. Here each row's mask comes from a generator of its own, seeded by (seed, step, row, layer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class RowNoise:
    """What the next forward pass holds: the ``rows`` by number within the step, their ``lengths`` in tokens, the layout."""

    seed: int
    step: int = 0
    rows: Sequence[int] = ()
    lengths: Sequence[int] = ()
    packed: bool = True
    layers: int = field(default=0)

    def drop(self, x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
        """Inverted dropout of ``x`` (..., width): packed (1, tokens, width) or padded (rows, longest, width)."""
        width = x.shape[-1]
        kept = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        flat = kept.view(-1, width)
        start, longest = 0, 0 if self.packed else x.shape[1]
        for place, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            begin = start if self.packed else place * longest
            key = hashlib.blake2b(repr((self.seed, self.step, row, layer)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            mask = torch.rand(length, width, generator=generator) >= p
            flat[begin : begin + length] = mask.to(device=x.device, dtype=x.dtype) / (1 - p)
            start += length
        return x * kept


def install(model: nn.Module, seed: int) -> tuple[RowNoise | None, list[str]]:
    """Put row-wise dropout in place of every ``nn.Dropout`` of ``model`` and switch dropout of attention probabilities off.

    Returns the noise to be told of each micro-batch (None when nothing drops) and what was switched off, to be said once.
    """
    switched_off = _no_attention_dropout(model)
    noise = RowNoise(seed)
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            dropout: Any = module
            dropout.forward = _RowDropout(module, noise, noise.layers)
            noise.layers += 1
    return (noise if noise.layers else None), switched_off


@dataclass
class _RowDropout:
    module: nn.Dropout
    noise: RowNoise
    layer: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise.drop(x, self.module.p, self.layer) if self.module.training else x


def _no_attention_dropout(model: nn.Module) -> list[str]:
    """Fused attention kernels cannot drop probabilities by row; modern models do not drop them at all."""
    found: set[float] = set()
    for module in model.modules():
        rate: Any = getattr(module, "attention_dropout", None)
        if isinstance(rate, float) and rate > 0:
            module.attention_dropout = 0.0  # type: ignore[assignment]
            found.add(rate)
        inner = getattr(module, "attn_dropout", None)
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            found.add(inner.p)
            inner.p = 0.0
    return [f"the model's dropout of attention probabilities ({rate:g}) is off" for rate in sorted(found)]
