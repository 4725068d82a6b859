"""Dropout, and noise on the embeddings, that depend on the seed, the step and the row, and on nothing else.

Torch draws from one stream, so another split of the same step, another number of processes or a resumed run would draw something
else. Here each row's numbers are a hash of (seed, step, row, layer) and the place in the row. A layer that is computed again in
the backward pass drops again what it dropped before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import kernels
from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES = {"q", "query", "query_proj", "in_proj"}
"""Layers by which a module is known for the attention itself: what it drops, but for its outputs, has no tokens of a row."""
CHUNK = 1 << 22
"""Numbers drawn at a time where there is no C: the hash needs 8 bytes for each."""
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
    read: torch.Tensor | None = None
    """Places of the batch whose outputs alone leave the last layer, where the rest of it is not computed for the others."""

    def drop(self, x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
        """Inverted dropout of ``x``: packed (1, tokens, width), padded (rows, longest, width), or the part of it that is read."""
        if not self.rows:  # a trial, before the first step
            return x
        tokens = x.shape[:-1].numel()
        number, place = self._places(1 if self.packed else x.shape[1])
        if self.read is not None and tokens == len(self.read) != len(place):
            chosen = self.read.cpu().numpy()
            number, place = number[chosen], place[chosen]
        if tokens != len(place):
            raise ValueError(f"dropout was told of {len(place)} tokens and met {tokens}")
        keys = np.array([self._key(row, layer) for row in self.rows], np.int64).reshape(-1, 2)[number]
        out: torch.Tensor = RowDropout.apply(x, torch.from_numpy(keys), torch.from_numpy(place), p)
        return out

    def shake(self, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``x``, laid out as in :meth:`drop`, plus uniform noise of at most alpha / sqrt(L d) (Jain et al. 2023, algorithm 1).

        L is the row's own length, d the width: neither padding nor the rows beside it change what a row gets. Padding gets none.
        """
        width, start = x.shape[-1], 0
        noise = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        flat = noise.view(-1, width)
        for number, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            begin = start if self.packed else number * x.shape[1]
            keys = torch.tensor([self._key(row, "embedding")], device=x.device).expand(length, 2)
            drawn = random_bits(keys, torch.arange(length, device=x.device), width).float() / 2**24
            flat[begin : begin + length] = (2 * drawn - 1) * (alpha / drawn.numel() ** 0.5)
            start += length
        return x + noise

    def _key(self, row: int, layer: int | str) -> tuple[int, int]:
        """Two numbers of 32 bits that name what is drawn for a row in a layer."""
        key = hashlib.blake2b(repr((self.seed, self.step, row, layer)).encode(), digest_size=8).digest()
        return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")

    def _places(self, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each token of the batch: which of ``rows`` it is of, and where in it; padding stands at -1."""
        lengths = np.array([length + self.ahead for length in self.lengths], np.int64)
        if self.packed:
            number = np.repeat(np.arange(len(lengths)), lengths)
            return number, np.arange(len(number)) - (np.cumsum(lengths) - lengths)[number]
        column = np.broadcast_to(np.arange(longest), (len(lengths), longest))
        place = np.where(column < lengths[:, None], column, -1)
        return np.repeat(np.arange(len(lengths)), longest), place.reshape(-1)


def random_bits(keys: torch.Tensor, place: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, width) of 24 random bits, int64: element j of row i is a hash of ``keys`` (rows, 2) and ``place[i]`` * width + j.

    It is the finaliser of MurmurHash3, twice; kernels_encoder.c has the same, bit for bit.
    """
    at = place[:, None] * width + torch.arange(width, device=place.device)
    h = (at * 0x9E3779B1 + keys[:, :1]) & 0xFFFFFFFF
    for salt in (0, keys[:, 1:]):
        h = h ^ salt
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h >> 8


class RowDropout(torch.autograd.Function):
    """``x`` (..., width) with each element kept, times 1 / (1 - p), or 0. Nothing of the choice is kept: it is made again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keys: torch.Tensor, place: torch.Tensor, p: float) -> torch.Tensor:
        ctx.save_for_backward(keys, place)
        ctx.p = p
        return _dropped(x, keys, place, p)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        keys, place = ctx.saved_tensors
        return _dropped(grad, keys, place, ctx.p), None, None, None


def _dropped(x: torch.Tensor, keys: torch.Tensor, place: torch.Tensor, p: float) -> torch.Tensor:
    width, least, scale = x.shape[-1], math.ceil(p * 2**24), 1 / (1 - p) if p < 1 else 0.0
    x = x.contiguous()
    if kernels.available(x):
        y = torch.empty_like(x)
        kernels.call("row_dropout", x.dtype, x, y, keys, place, scale, least, len(place), width)
        return y
    flat, parts, rows = x.view(-1, width), [], max(CHUNK // width, 1)
    keys, place = keys.to(x.device), place.to(x.device)
    for start in range(0, len(place), rows):
        here = slice(start, start + rows)
        real = place[here, None] >= 0
        kept = (random_bits(keys[here], place[here], width) >= least) | ~real
        exact = flat[here].to(torch.promote_types(x.dtype, torch.float32))
        parts.append((torch.where(real, exact * scale, exact) * kept).to(x.dtype))
    return torch.cat(parts).view(x.shape) if parts else x


def of(model: PreTrainedModel) -> RowNoise | None:
    """What :func:`install` made for ``model``, if it draws anything."""
    return _installed.get(base(model))


def install(
    model: nn.Module, seed: int, neftune_alpha: float | None = None
) -> tuple[RowNoise | None, list[str]]:
    """Put row-wise dropout in place of every ``nn.Dropout`` of ``model`` and switch dropout of attention probabilities off.

    With ``neftune_alpha``, what the input embedding gives out is shaken in training mode: after a scale that is part of that
    module (gemma's), as in transformers, and after what peft wrapped around it. It is a hook, so nothing of it is saved.

    Returns the noise to be told of each micro-batch (None when nothing is drawn) and what was switched off, to be said once.
    """
    switched_off = _no_attention_dropout(model)
    noise = RowNoise(seed, ahead=virtual_tokens.embedded(model))
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            dropout: Any = module
            dropout.forward = _RowDropout(module, noise, noise.layers)
            noise.layers += 1
    if neftune_alpha is not None:
        base(model).get_input_embeddings().register_forward_hook(_Shake(noise, neftune_alpha))
    if not noise.layers and neftune_alpha is None:
        return None, switched_off
    _installed[base(model)] = noise
    return noise, switched_off


def switch_off(model: nn.Module) -> list[str]:
    """Drop nothing at all in ``model``: for figures that must be facts of its weights. Returns what was switched off.

    Many architectures (opt, xglm, biogpt, bloom) drop by a function and keep its rate as a number: any with "drop" in its name.
    """
    said = _no_attention_dropout(model)
    rates = set()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            rates.add(module.p)
            module.p = 0.0
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float) and rate > 0:
                rates.add(rate)
                setattr(module, name, 0.0)
    return [
        *said,
        *(
            f"dropout ({rate:g}) is off: log-probabilities and rewards are facts of the weights"
            for rate in sorted(rates)
        ),
    ]


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
        own = (
            "dropout" if hasattr(module, "is_causal") else "attn_dropout"
        )  # bert's attention has it under the first name
        inner = getattr(module, own, getattr(module, "attn_dropout", None))
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            found.add(inner.p)
            inner.p = 0.0
        children = dict(module.named_children())
        for name, child in children.items() if QUERIES & children.keys() else ():
            if isinstance(child, nn.Dropout) and child.p > 0 and not name.startswith("out"):
                found.add(child.p)
                child.p = 0.0
    return [f"the model's dropout of attention probabilities ({rate:g}) is off" for rate in sorted(found)]
