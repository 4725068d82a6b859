"""Dropout, and noise on the embeddings, that depend on the seed, the step and the row, and on nothing else.

Torch draws from one stream, so another split of the same step, another number of processes or a resumed run would draw something
else. Here each row's numbers come from a generator of its own, seeded by (seed, step, row, layer). A layer that is computed
again in the backward pass drops again what it dropped before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tunesmith.models import head, virtual

_installed: WeakKeyDictionary[nn.Module, RowNoise] = WeakKeyDictionary()


@dataclass
class RowNoise:
    """What the next forward pass holds: the ``rows`` by number within the step, their ``lengths`` in tokens, the layout.

    ``ahead``: virtual tokens in front of each row, which go through the layers but not through the embedding.
    """

    seed: int
    step: int = 0
    rows: Sequence[int] = ()
    lengths: Sequence[int] = ()
    packed: bool = True
    layers: int = field(default=0)
    ahead: int = 0

    def drop(self, x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
        """Inverted dropout of ``x`` (..., width): packed (1, tokens, width) or padded (rows, longest, width)."""
        kept = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        for part, drawn in self._drawn(kept, layer, self.ahead):
            part.copy_((drawn >= p).to(x.dtype) / (1 - p))
        return x * kept

    def shake(self, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``x``, laid out as in :meth:`drop`, plus uniform noise of at most alpha / sqrt(L d) (Jain et al. 2023, algorithm 1).

        L is the row's own length, d the width: neither padding nor the rows beside it change what a row gets. Padding gets none.
        """
        noise = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for part, drawn in self._drawn(noise, "embedding"):
            part.copy_((2 * drawn - 1) * (alpha / drawn.numel() ** 0.5))
        return x + noise

    def _drawn(self, x: torch.Tensor, layer: int | str, ahead: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each row's part of ``x``, a view (length, width), with as many numbers drawn uniformly from [0, 1) for it."""
        width = x.shape[-1]
        flat = x.view(-1, width)
        start, longest = 0, 0 if self.packed else x.shape[1]
        for place, (row, tokens) in enumerate(zip(self.rows, self.lengths, strict=True)):
            length = tokens + ahead
            begin = start if self.packed else place * longest
            key = hashlib.blake2b(repr((self.seed, self.step, row, layer)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            yield flat[begin : begin + length], torch.rand(length, width, generator=generator)
            start += length


def of(model: Any) -> RowNoise | None:
    """What :func:`install` made for ``model``, if it draws anything."""
    return _installed.get(head.base(model))


def install(model: nn.Module, seed: int, neftune_alpha: float | None = None) -> tuple[RowNoise | None, list[str]]:
    """Put row-wise dropout in place of every ``nn.Dropout`` of ``model`` and switch dropout of attention probabilities off.

    With ``neftune_alpha``, what the input embedding gives out is shaken in training mode: after a scale that is part of that
    module (gemma's), as in transformers, and after what peft wrapped around it. It is a hook, so nothing of it is saved.

    Returns the noise to be told of each micro-batch (None when nothing is drawn) and what was switched off, to be said once.
    """
    switched_off = _no_attention_dropout(model)
    noise = RowNoise(seed, ahead=virtual.embedded(model))
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            dropout: Any = module
            dropout.forward = _RowDropout(module, noise, noise.layers)
            noise.layers += 1
    if neftune_alpha is not None:
        head.base(model).get_input_embeddings().register_forward_hook(_Shake(noise, neftune_alpha))
    if not noise.layers and neftune_alpha is None:
        return None, switched_off
    _installed[head.base(model)] = noise
    return noise, switched_off


@dataclass
class _Shake:
    noise: RowNoise
    alpha: float

    def __call__(self, module: nn.Module, arguments: Any, embedded: torch.Tensor) -> torch.Tensor:
        return self.noise.shake(embedded, self.alpha) if module.training else embedded


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
        own = "dropout" if hasattr(module, "is_causal") else "attn_dropout"  # bert's attention has it under the first name
        inner = getattr(module, own, getattr(module, "attn_dropout", None))
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            found.add(inner.p)
            inner.p = 0.0
    return [f"the model's dropout of attention probabilities ({rate:g}) is off" for rate in sorted(found)]
