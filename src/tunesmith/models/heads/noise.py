"""Dropout and embedding noise (NEFTune) that depend on the seed, the step and the row alone.

torch draws from one stream, so another split of the same step, another number of processes or a resumed run
would draw other numbers. Here the numbers of a row are a hash of (seed, step, row, layer) and the position in
the row. A layer that is recomputed in the backward pass drops the same elements again.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import kernels
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.network import attribute, base, has_attributes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES = {"q", "query", "query_proj", "in_proj"}
"""Child names by which an attention module is recognised. Its dropouts act on attention probabilities, except
the one on its output."""
CHUNK = 1 << 22
"""Numbers drawn at a time without the C kernel: the hash needs 8 bytes for each."""
_installed: WeakKeyDictionary[nn.Module, RowNoise] = WeakKeyDictionary()


@dataclass
class RowNoise(threading.local):
    """Draws for the ``rows`` (numbers within the step) of the next forward pass in this thread, of ``lengths`` tokens.

    ``layers``: how many layers drop; ``ahead``: virtual tokens in front of each row, which go through the
    layers but not through the embedding; ``read``: the positions to which the last layer is restricted.
    """

    seed: int
    step: int = 0
    rows: Sequence[int] = ()
    lengths: Sequence[int] = ()
    packed: bool = True
    layers: int = 0
    ahead: int = 0
    read: Tensor | None = None
    misplaced: set[int] | None = None
    """During :func:`switch_off_misplaced`: the layers that do not drop hidden states of the rows' tokens."""

    def drop(self, x: Tensor, p: float, layer: int) -> Tensor:
        """Inverted dropout of ``x``: packed (1, tokens, width), padded (rows, longest, width) or ``read``."""
        if not self.rows:  # the parity check, before the first step
            return x
        tokens = x.shape[:-1].numel()
        row, position = self._positions(1 if self.packed else x.shape[1])
        if self.read is not None and tokens == len(self.read) != len(position):
            chosen = self.read.cpu().numpy()
            row, position = row[chosen], position[chosen]
        if tokens != len(position) and self.misplaced is not None:
            self.misplaced.add(layer)
            return x
        if tokens != len(position):
            raise ValueError(f"dropout expects {len(position)} tokens and got {tokens}")
        keys = np.array([self._key(number, layer) for number in self.rows], np.int64).reshape(-1, 2)[row]
        out: Tensor = RowDropout.apply(x, torch.from_numpy(keys), torch.from_numpy(position), p)
        return out

    def add_noise(self, x: Tensor, alpha: float) -> Tensor:
        """``x``, laid out as in :meth:`drop`, plus uniform noise of at most alpha / sqrt(L d).

        Jain et al. 2023, algorithm 1. L is the length of the row itself, d the width. Padding has no noise.
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
        """Two 32-bit numbers that seed the draws of a row in a layer."""
        key = hashlib.blake2b(repr((self.seed, self.step, row, layer)).encode(), digest_size=8).digest()
        return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")

    def _positions(self, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """(index into ``rows``, position in that row) of each token; the position of padding is -1."""
        lengths = np.array([length + self.ahead for length in self.lengths], np.int64)
        if self.packed:
            row = np.repeat(np.arange(len(lengths)), lengths)
            return row, np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
        column = np.broadcast_to(np.arange(longest), (len(lengths), longest))
        position = np.where(column < lengths[:, None], column, -1)
        return np.repeat(np.arange(len(lengths)), longest), position.reshape(-1)


def random_bits(keys: Tensor, position: Tensor, width: int) -> Tensor:
    """(rows, width) of 24 random bits: element j of row i hashes ``keys[i]`` and ``position[i]`` * width + j.

    ``keys`` (rows, 2), all int64. kernels_encoder.c has the same, bit for bit.
    """
    at = position[:, None] * width + torch.arange(width, device=position.device)
    h = kernels.mix_bits((at * 0x9E3779B1 + keys[:, :1]) & 0xFFFFFFFF)
    return kernels.mix_bits(h ^ keys[:, 1:]) >> 8


class RowDropout(torch.autograd.Function):
    """``x`` (..., width), each element times 1 / (1 - p) or 0. No mask is saved: backward draws it again."""

    @staticmethod
    def forward(ctx: Context[float], x: Tensor, keys: Tensor, position: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(keys, position)
        ctx.kept = p
        return _dropped(x, keys, position, p)

    @staticmethod
    def backward(ctx: Context[float], grad: Tensor) -> Gradients:
        keys, position = ctx.saved_tensors
        return _dropped(grad, keys, position, ctx.kept), None, None, None


def _dropped(x: Tensor, keys: Tensor, position: Tensor, p: float) -> Tensor:
    width, least, scale = x.shape[-1], math.ceil(p * 2**24), 1 / (1 - p) if p < 1 else 0.0
    x = x.contiguous()
    if kernels.available(x):
        y = torch.empty_like(x)
        kernels.call("row_dropout", x.dtype, x, y, keys, position, scale, least, len(position), width)
        return y
    flat, parts, rows = x.view(-1, width), [], max(CHUNK // width, 1)
    keys, position = keys.to(x.device), position.to(x.device)
    for start in range(0, len(position), rows):
        here = slice(start, start + rows)
        real = position[here, None] >= 0
        kept = (random_bits(keys[here], position[here], width) >= least) | ~real
        exact = flat[here].to(torch.promote_types(x.dtype, torch.float32))
        parts.append((torch.where(real, exact * scale, exact) * kept).to(x.dtype))
    return torch.cat(parts).view(x.shape) if parts else x


def of(model: PreTrainedModel) -> RowNoise | None:
    """Return the noise that :func:`install` made for ``model``, if it draws anything."""
    return _installed.get(base(model))


@contextmanager
def override(model: PreTrainedModel, **changes: object) -> Iterator[None]:
    """Change fields of the model's :class:`RowNoise`, if it has one, inside the ``with`` block."""
    drawn = of(model)
    fields = {} if drawn is None else vars(drawn)
    before = dict(fields)
    fields.update(changes)
    try:
        yield
    finally:
        fields.update(before)


def install(
    model: PreTrainedModel, seed: int, neftune_alpha: float | None = None
) -> tuple[RowNoise | None, list[str]]:
    """Seed every ``nn.Dropout`` of ``model`` per row, and switch dropout of attention probabilities off.

    With ``neftune_alpha``, a hook adds noise to the output of the input embedding in training mode: after a
    scale inside the module (gemma) and after peft's wrappers, as in transformers.

    Returns the noise, which the loop sets before each micro-batch (None when nothing is drawn), and lines to
    print on dropout that is now off.
    """
    switched_off = _switch_off_attention_dropout(model)
    noise = RowNoise(seed, ahead=virtual_tokens.count_embedded(model))
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            module.forward = partial(_drop, noise, module, noise.layers)  # type: ignore[method-assign]
            noise.layers += 1
    if neftune_alpha is not None:
        base(model).get_input_embeddings().register_forward_hook(partial(_add_noise, noise, neftune_alpha))
    if not noise.layers and neftune_alpha is None:
        return None, switched_off
    _installed[base(model)] = noise
    return noise, switched_off


def switch_off_misplaced(
    model: PreTrainedModel, lengths: Sequence[int], packed: bool, forward: Callable[[], object]
) -> list[str]:
    """Switch off each dropout that does not act on hidden states, and return lines to print.

    Attention probabilities, tables of positions and the like cannot be dropped by row. ``forward`` runs the network
    on rows of ``lengths`` tokens.
    """
    misplaced: set[int] = set()
    with override(model, rows=range(len(lengths)), lengths=lengths, packed=packed, misplaced=misplaced):
        forward()
    rates: dict[str, float] = {}
    for name, module in model.named_modules():
        drop = vars(module).get("forward")
        if isinstance(drop, partial) and drop.func is _drop and drop.args[2] in misplaced:
            rates[name.rpartition(".")[2]] = module.p
            module.p = 0.0
            del module.forward
    return [
        f"dropout ({rate:g}) in {name} is off: it acts on something else than the hidden states of a row"
        for name, rate in rates.items()
    ]


def switch_off(model: PreTrainedModel) -> list[str]:
    """Switch all dropout of ``model`` off, for losses that need exact log-probs. Returns lines to print."""
    lines = _switch_off_attention_dropout(model)
    rates = set()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            rates.add(module.p)
            module.p = 0.0
        for name, rate in vars(module).items():  # opt, xglm, biogpt, bloom call F.dropout with a float
            if "drop" in name and isinstance(rate, float) and rate > 0:
                rates.add(rate)
                setattr(module, name, 0.0)
    why = "log-probabilities and rewards must depend on the weights alone"
    return lines + [f"dropout ({rate:g}) is off: {why}" for rate in sorted(rates)]


def _add_noise(noise: RowNoise, alpha: float, module: nn.Module, given: object, embedded: Tensor) -> Tensor:
    return noise.add_noise(embedded, alpha) if module.training else embedded


def _drop(noise: RowNoise, module: nn.Dropout, layer: int, x: Tensor) -> Tensor:
    return noise.drop(x, module.p, layer) if module.training else x


def _switch_off_attention_dropout(model: PreTrainedModel) -> list[str]:
    """Switch it off and return lines to print. Fused attention kernels cannot drop by row."""
    rates: set[float] = set()
    for module in model.modules():
        is_attention = has_attributes(module, "is_causal")  # bert's calls it "dropout"
        for name in ("attention_dropout", *(("dropout", "attn_dropout") if is_attention else ())):
            rate = attribute(module, name)  # biogpt's and gpt_bigcode's are numbers
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                rates.add(rate)
        inside = [attribute(module, *(("dropout",) if is_attention else ()), "attn_dropout")]
        children = dict(module.named_children())
        if QUERIES & children.keys():
            inside += [child for name, child in children.items() if not name.startswith("out")]
        for dropout in inside:
            if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                rates.add(dropout.p)
                dropout.p = 0.0
    return [f"the model's dropout of attention probabilities ({rate:g}) is off" for rate in sorted(rates)]
