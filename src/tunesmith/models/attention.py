"""Attention over packed rows: several sequences side by side in one, each seeing only itself.

Registered with transformers' ``AttentionInterface`` under ``tunesmith_segments``, with a mask function that builds no mask. A
model calls it once per layer; the boundaries arrive as the keyword ``segments`` that its forward passes through. Whatever else a
model wants of attention (a sliding window shorter than a segment, a soft cap, a position bias) is refused, never ignored: the
caller then pads instead.

A GPU that ``varlen.py`` serves takes that way; this one is for CPUs, for fp32 on a GPU and for GPUs before Ampere. There it is
one call of ``scaled_dot_product_attention`` for each segment. The alternative, one call with a block-diagonal mask, would work on
all pairs of tokens of the row, ten times as many at ten segments, and hold a mask that grows with their square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tunesmith.models import both_ways, kernels
from tunesmith.models.layout import Layout

NAME = "tunesmith_segments"
ROWS = 256
"""Queries whose attention weights are made again together in the backward pass."""
HARMLESS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
    "layer_idx",
    "is_causal",
    "past_key_values",
    "read",
}


_watchers: list[list[int | None]] = []


@contextmanager
def watch() -> Iterator[list[int | None]]:
    """The list that is yielded gets one entry for each call of packed attention: its sliding window, or None."""
    seen: list[int | None] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


class CannotPack(Exception):
    """The model asks attention for something that packed rows cannot give exactly."""


def register() -> None:
    """Make ``attn_implementation="tunesmith_segments"`` known to transformers."""
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Segments replace the mask."""
    return None


def refuse(
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    told: bool,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Raise CannotPack for whatever packed attention would not do exactly.

    ``told``: whether the segments arrived; ``others``: the keywords that the caller does not know by name.
    """
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise CannotPack(f"its attention uses {', '.join(unknown)}")
    if not told or attention_mask is not None or query.shape[0] != 1:
        raise CannotPack("its forward does not pass the segments on to attention")
    if dropout:
        raise CannotPack("its attention drops probabilities at random")


def is_causal(module: torch.nn.Module, others: dict[str, Any]) -> bool:
    """Whether a token sees only what stands before it: what the call says (in ``others``), else what the module says."""
    said = others.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def saw(sliding_window: int | None) -> None:
    """Tell whoever watches that attention was called."""
    for seen in _watchers:
        seen.append(sliding_window)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each segment: causal, or of an encoder from every token to every other.

    ``query`` (1, heads, tokens, dim), ``key`` and ``value`` (1, kv_heads, tokens, dim); ``segments`` holds the lengths, which sum
    to tokens. Returns (1, tokens, heads, dim). Where keys are more than queries, each segment has as many virtual ones in front.
    Raises CannotPack for anything it does not understand.
    """
    refuse(module, query, attention_mask, segments is not None, dropout, kwargs)
    assert segments is not None
    causal = is_causal(module, kwargs)
    if not causal and sliding_window is not None:
        sliding_window //= 2  # to either side
    if key.shape[2] != query.shape[2]:
        if not causal:
            raise CannotPack("virtual keys go with causal attention only")
        asked, layout = with_virtual(query, key, {"segments": segments})
        out, _ = segment_attention(
            module, asked, key, value, None, scaling, sliding_window=sliding_window, **layout.keywords
        )  # the same attention, over segments that are longer
        return layout.text(out), None
    if sliding_window is not None and sliding_window < max(segments):
        raise CannotPack(f"its attention slides over {sliding_window} tokens and a row has {max(segments)}")
    saw(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not causal:
        return both_ways.attend(query[0], key[0], value[0], segments, scale).unsqueeze(0), None
    if kernels.available(query) and value.shape[-1] == query.shape[-1]:
        out = CausalSegments.apply(query[0].contiguous(), key[0].contiguous(), value[0].contiguous(), segments, scale)
        return out.unsqueeze(0), None
    parts, start = [], 0
    for length in segments:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))
        start += length
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def with_virtual(query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]) -> tuple[torch.Tensor, Layout]:
    """``query`` with rows for the virtual keys in front of each segment: zeros, so that attention stays square and causal."""
    tokens, segments = query.shape[2], len(keywords.get("segments") or keywords["cu_seqlens"][1:])
    ahead = (key.shape[2] - tokens) // segments
    layout = Layout.of(keywords, ahead, tokens)
    assert layout is not None
    return layout.insert(query, query.new_zeros(1, query.shape[1], ahead, query.shape[3]), dim=2), layout


def forward_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...], scale: float) -> torch.Tensor:
    """(heads, tokens, dim) and twice (kv_heads, tokens, dim) -> (tokens, heads, dim), without a graph."""
    heads, tokens, dim = q.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype)
    start = 0
    for length in segments:
        end = start + length
        part = scaled_dot_product_attention(
            q[None, :, start:end],
            k[None, :, start:end],
            v[None, :, start:end],
            is_causal=True,
            scale=scale,
            enable_gqa=heads != k.shape[0],
        )
        out[start:end] = part[0].transpose(0, 1)
        start = end
    return out


def backward_segments(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward_segments` for ``grad`` (tokens, heads, dim), laid out like q, k and v.

    With P = causal softmax(scale q k^T): dV = P^T dO; dP = dO V^T; dS = scale P (dP - rowsum(P dP)); dQ = dS K; dK = dS^T Q. P is
    made again from q and k, for ``ROWS`` queries at a time and only the keys they see: torch's flash backward for CPUs takes
    three to five times as long at a few hundred tokens, and no (length, length) matrix is ever held.
    """
    heads, _, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    start = 0
    for length in segments:
        end = start + length
        k_all, v_all = k[:, start:end].contiguous(), v[:, start:end].contiguous()
        several = length > ROWS
        dk_sum, dv_sum = (torch.zeros(kv_heads, length, dim, dtype=torch.float32) for _ in range(2)) if several else (None, None)
        for first in range(0, length, ROWS):
            last = min(first + ROWS, length)
            here, rows = slice(start + first, start + last), last - first
            # the query heads that share a key head are stacked along the rows: (kv_heads, group * rows, dim)
            q_rows = q[:, here].reshape(kv_heads, group * rows, dim)
            grad_rows = grad[here].transpose(0, 1).reshape(kv_heads, group * rows, dim)
            k_part, v_part = k_all[:, :last], v_all[:, :last]
            p = torch.bmm(q_rows, k_part.transpose(1, 2))
            kernels.call("causal_softmax", q.dtype, p, scale, heads, rows, last)
            ds = torch.bmm(grad_rows, v_part.transpose(1, 2))
            dv_part = torch.bmm(p.transpose(1, 2), grad_rows)
            kernels.call("causal_softmax_backward", q.dtype, ds, p, scale, heads, rows, last)
            dq[:, here] = torch.bmm(ds, k_part).view(heads, rows, dim)
            dk_part = torch.bmm(ds.transpose(1, 2), q_rows)
            if dk_sum is None or dv_sum is None:
                dk[:, here], dv[:, here] = dk_part, dv_part
            else:
                dk_sum[:, :last] += dk_part
                dv_sum[:, :last] += dv_part
        if dk_sum is not None and dv_sum is not None:
            dk[:, start:end], dv[:, start:end] = dk_sum, dv_sum
        start = end
    return dq, dk, dv


class CausalSegments(torch.autograd.Function):
    """:func:`forward_segments` with :func:`backward_segments`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.scale = segments, scale
        return forward_segments(q, k, v, segments, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        return *backward_segments(grad, q, k, v, ctx.segments, ctx.scale), None, None
