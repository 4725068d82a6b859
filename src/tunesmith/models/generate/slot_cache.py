"""Keys and values of the running rows, each in a slot of fixed size, and attention that reads them there.

One forward pass takes tokens of many rows side by side: pieces of prompts, or the last token
of every running row. ``SlotCache`` is the cache that transformers' models fill; ``slot_attention``, registered
with transformers under its own name, computes what each token sees. The model's code is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from tunesmith.models.fast import attention, kernels
from tunesmith.models.generate.row_adapters import ACTIVE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tunesmith_slots"
ROWS = 256
"""Queries whose attention weights exist at the same time."""
HARMLESS = {"position_ids", "use_cache", "output_attentions", "cache_position", "layer_idx", "is_causal"}
"""Keywords of transformers that do not change what attention over slots computes."""


class CannotUseSlots(Exception):
    """The model's attention needs something that attention over slots does not compute."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one row in a forward pass: ``ids`` follow ``ahead`` tokens that slot ``slot`` already holds.

    ``adapter``: the name of the adapter that computes them; see ``row_adapters``. ``drawn``: the token is part of an
    answer, not of a prompt.
    """

    ids: Sequence[int]
    slot: int
    ahead: int
    adapter: str | None = ACTIVE
    drawn: bool = False

    @property
    def end(self) -> int:
        return self.ahead + len(self.ids)


class SlotCache(Cache):
    """Keys and values of every layer, (slots, kv_heads, capacity, head_dim), allocated at the first pass.

    ``begin`` sets the tokens of the next forward pass. Each slot begins with ``virtual`` virtual tokens of an
    adapter, which no ``Piece`` counts; ``capacity`` includes them.
    """

    def __init__(self, slots: int, tokens: int, virtual: int = 0) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity, self.virtual = slots, tokens + virtual, virtual
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.layer = 0
        """The layer that was updated last."""
        self.calls = 0
        """Calls of attention since ``begin``."""
        self.filled = 0
        """The largest number of tokens that a slot has held; places after these are not initialised."""

    def resized(self, slots: int, tokens: int) -> SlotCache:
        """Return a cache of another size with the content that fits, and leave this one empty.

        The new memory is taken first: if it runs out, this cache stays as it is. Then each tensor is copied and freed, so
        that no content is in memory twice, because the system counts memory only when it is written to.
        """
        new = SlotCache(slots, tokens, self.virtual)
        new.filled = min(new.capacity, self.filled)
        part = slice(min(slots, self.slots)), slice(None), slice(new.filled)
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            theirs += [old.new_empty(slots, old.shape[1], new.capacity, old.shape[3]) for old in mine]
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            for target in theirs:
                target[part] = mine.pop(0)[part]
                if slots:
                    kernels.return_freed_memory()
        return new

    def begin(self, pieces: Sequence[Piece], device: torch.device) -> None:
        """Set the tokens of the next pass, in the order of the joined sequence."""
        self.pieces, self.calls = pieces, 0
        self.decoding = all(len(piece.ids) == 1 for piece in pieces)
        self.filled = max([self.filled, *(self.virtual + piece.end for piece in pieces)])
        slots = [piece.slot for piece in pieces for _ in piece.ids]
        places = [self.virtual + place for piece in pieces for place in range(piece.ahead, piece.end)]
        self.slot_of_token = torch.tensor(slots, device=device)
        self.place_of_token = torch.tensor(places, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (1, kv_heads, tokens, head_dim) of the pass; return them unchanged.

        Tokens after those of the pieces are padding.
        """
        if layer_idx == len(self.keys):
            for states, stored in ((key_states, self.keys), (value_states, self.values)):
                shape = (self.slots, states.shape[1], self.capacity, states.shape[3])
                stored.append(states.new_empty(shape))
        if key_states.shape[0] != 1 or layer_idx >= len(self.keys):
            raise CannotUseSlots("its layers do not fill the cache one after another")
        where = (self.slot_of_token, slice(None), self.place_of_token)
        tokens = len(self.slot_of_token)
        self.keys[layer_idx][where] = key_states[0, :, :tokens].transpose(0, 1)
        self.values[layer_idx][where] = value_states[0, :, :tokens].transpose(0, 1)
        self.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy the virtual tokens and the first ``tokens`` of slot ``source`` to slot ``target``."""
        part = slice(self.virtual + tokens)
        for stored in (*self.keys, *self.values):
            stored[target, :, part] = stored[source, :, part]


def register() -> None:
    """Make ``attn_implementation="tunesmith_slots"`` known to transformers, without a mask function."""
    AttentionInterface.register(NAME, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    slots: SlotCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return causal attention of each token to its row's tokens in the cache, (1, tokens, heads, dim).

    ``query`` (1, heads, tokens, dim); tokens after those of the pieces are padding, whose attention is 0.
    ``key`` and ``value`` are in the cache already. ``softcap``: scores become
    softcap * tanh(score / softcap) (gemma2). Raises CannotUseSlots for arguments that it does not support.
    """
    unknown = [name for name, given in kwargs.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise CannotUseSlots(f"its attention uses {', '.join(unknown)}")
    if slots is None or attention_mask is not None or query.shape[0] != 1:
        raise CannotUseSlots("its forward does not pass the slots on to attention")
    slots.calls += 1
    keys, values = slots.keys[slots.layer], slots.values[slots.layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if slots.decoding and kernels.available(query) and query.dtype == keys.dtype:
        return _decode_by_kernel(query, keys, values, slots, scale, window, softcap or 0.0), None
    out = query.new_empty(query.shape[2], query.shape[1], values.shape[-1])
    start = 0
    for piece in slots.pieces:
        stop = start + len(piece.ids)
        end = slots.virtual + piece.end
        seen = (keys[piece.slot, :, :end], values[piece.slot, :, :end])
        out[start:stop] = attend(query[0, :, start:stop], *seen, scale, window, softcap)
        start = stop
    out[start:] = 0
    return out[None], None


def _decode_by_kernel(
    query: Tensor, keys: Tensor, values: Tensor, slots: SlotCache, scale: float, window: int, softcap: float
) -> Tensor:
    """Compute attention of one token of each row to all tokens of its slot.

    Each key and value is read once.
    """
    heads, rows, dim = query.shape[1:]
    q = query[0].transpose(0, 1).contiguous()
    out = query.new_empty(rows, heads, values.shape[-1])
    lengths = slots.place_of_token + 1
    sizes = (window, rows, heads, keys.shape[1], slots.capacity, dim, values.shape[-1])
    kernels.call(
        "decode_attention",
        q.dtype,
        q,
        keys,
        values,
        slots.slot_of_token,
        lengths,
        out,
        scale,
        softcap,
        *sizes,
    )
    return out[None]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int = 0, softcap: float | None = None
) -> Tensor:
    """Return the attention of ``query`` (heads, rows, dim) to one slot, shape (rows, heads, dim).

    ``keys`` and ``values``: (kv_heads, seen, dim). The rows are the last of the ``seen`` tokens.
    """
    heads, rows, dim = query.shape
    kv_heads, seen, _ = keys.shape
    if kernels.available(query) and query.dtype == keys.dtype and query.stride(-1) == 1 and dim % 2 == 0:
        return _attend_by_kernel(query, keys, values, scale, window, softcap or 0.0)
    parts = []
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        visible = seen - rows + last
        q = query[:, first:last].reshape(kv_heads, -1, dim)
        scores = torch.bmm(q, keys[:, :visible].transpose(1, 2))
        scores = _masked_softmax(scores, scale, last - first, window, softcap)
        part = torch.bmm(scores, values[:, :visible])
        parts.append(part.view(heads, last - first, -1).transpose(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_by_kernel(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Compute :func:`attend` in C: no product is compiled for each length of a prompt.

    In fp32 this is the attention that training uses; it has no window and no soft cap.
    """
    heads, rows, dim = query.shape
    kv_heads, seen, value_dim = values.shape
    out = query.new_empty(rows, heads, value_dim)
    strides = (*query.stride()[:2], keys.stride(0), values.stride(0))
    tensors = query, keys, values, out
    if attention.in_c(query) and value_dim == dim and not softcap and not 0 < window < seen:
        of_slot = heads, kv_heads, rows, seen, dim
        kernels.call_in_memory("causal_attention_of_slot", None, *tensors, scale, *of_slot, *strides)
        return out
    sizes = (window, heads, kv_heads, rows, seen, dim, value_dim)
    kernels.call_in_memory("prefill_attention", query.dtype, *tensors, scale, softcap, *sizes, *strides)
    return out


def _masked_softmax(scores: Tensor, scale: float, rows: int, window: int, softcap: float | None) -> Tensor:
    """Return the softmax of (kv_heads, group * rows, seen) over the tokens that each row sees.

    It is computed in fp32 and rounded at the end.
    """
    seen = scores.shape[-1]
    exact = scores.float() * scale
    if softcap:
        exact = softcap * torch.tanh(exact / softcap)
    place = torch.arange(seen, device=scores.device)
    last = place[seen - rows :, None]
    hidden = place > last
    if window:
        hidden |= place <= last - window
    exact = exact.view(len(scores), -1, rows, seen).masked_fill(hidden, float("-inf"))
    return exact.softmax(dim=-1).to(scores.dtype).view(scores.shape)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes that one token takes in the cache of ``model``."""
    config = model.config.get_text_config()
    facts: Mapping[str, int] = config.to_dict()
    heads = facts.get("num_attention_heads") or facts.get("n_head") or 1
    kv_heads = facts.get("num_key_value_heads") or heads
    hidden = facts.get("hidden_size") or facts.get("n_embd") or 1
    dim = facts.get("head_dim") or hidden // heads
    return 2 * config.num_hidden_layers * kv_heads * dim * model.dtype.itemsize
