"""Attention over packed rows: several sequences side by side in one, each seeing only itself.

Registered with transformers' ``AttentionInterface`` under ``tunesmith_segments``, with a mask function that builds no mask. A
model calls it once per layer; the boundaries arrive as the keyword ``segments`` that its forward passes through. Whatever else a
model wants of attention (a sliding window shorter than a segment, a soft cap, a position bias) is refused, never ignored: the
caller then pads instead.

A GPU that ``varlen.py`` serves takes that way; this one is for CPUs, for fp32 on a GPU and for GPUs before Ampere. There it is
one call of ``scaled_dot_product_attention`` for each segment; on a CPU with ``kernels.py`` both passes are our own. The
alternative, one call with a block-diagonal mask, would work on all pairs of tokens of the row, ten times as many at ten
segments, and hold a mask that grows with their square.

With the keyword ``behind`` answers share a prefix, see ``pieces.py``: everything but attention is done once for the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tunesmith.models.adapters.virtual_token_layout import Layout
from tunesmith.models.fast import kernels
from tunesmith.models.fast.segments import Family, Run, families, longest
from tunesmith.models.heads import bidirectional_attention

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
    """Make ``attn_implementation="tunesmith_segments"`` known to transformers.

    No mask function has this name, and for such names transformers makes no mask: segments replace it. With one that returns
    None it would first look for packed rows in the positions, and wait for the device to learn what it found.
    """
    AttentionInterface.register(NAME, segment_attention)


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
    behind: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each segment, and the one that it is ``behind``: causal, or of an encoder from every token to every other.

    ``query`` (1, heads, tokens, dim), ``key`` and ``value`` (1, kv_heads, tokens, dim); ``segments`` holds the lengths, which sum
    to tokens. Returns (1, tokens, heads, dim). Where keys are more than queries, each segment has as many virtual ones in front.
    Raises CannotPack for anything it does not understand.
    """
    refuse(module, query, attention_mask, segments is not None, dropout, kwargs)
    assert segments is not None
    causal = is_causal(module, kwargs)
    if behind is not None:
        refuse_shared(causal, key.shape[2] - query.shape[2])
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
    most = longest(segments, behind)
    if sliding_window is not None and sliding_window < most:
        raise CannotPack(f"its attention slides over {sliding_window} tokens and a row has {most}")
    saw(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not causal:
        return bidirectional_attention.attend(query[0], key[0], value[0], segments, scale).unsqueeze(0), None
    kinds = families(segments, behind)
    if kernels.available(query) and value.shape[-1] == query.shape[-1]:
        out = CausalSegments.apply(
            query[0].contiguous(), key[0].contiguous(), value[0].contiguous(), kinds, scale
        )
        return out.unsqueeze(0), None
    return plainly(query, key, value, kinds, scale).transpose(1, 2).contiguous(), None


def refuse_shared(causal: bool, virtual: int) -> None:
    """Raise CannotPack for attention in which answers cannot share a prefix. ``virtual``: keys that are no token's."""
    if not causal:
        raise CannotPack("answers share a prefix only where attention is causal")
    if virtual:
        raise CannotPack("answers cannot share a prefix that stands behind virtual tokens")


def plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kinds: tuple[Family, ...], scale: float
) -> torch.Tensor:
    """The same by torch's own attention, one call for each run. (1, heads, tokens, dim)."""
    exact = torch.promote_types(key.dtype, torch.float32)
    grouped, parts = query.shape[1] != key.shape[1], []
    for family in kinds:
        # what several runs see goes through fp32: there autograd sums what each of them gives back
        shared = [
            x[:, :, family.start : family.start + family.runs[-1].ahead].to(exact) for x in (key, value)
        ]
        for run in family.runs:
            here = slice(run.start, run.start + run.length)
            q, k, v = (x[:, :, here] for x in (query, key, value))
            mask = None
            if run.ahead:
                k, v = (
                    torch.cat([ahead.to(x.dtype), x], dim=2) for ahead, x in zip(shared, (k, v), strict=True)
                )
                mask = torch.ones(run.length, run.keys, dtype=torch.bool, device=q.device).tril(run.ahead)
            parts.append(
                scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            )
    return torch.cat(parts, dim=2)


def with_virtual(
    query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]
) -> tuple[torch.Tensor, Layout]:
    """``query`` with rows for the virtual keys in front of each segment: zeros, so that attention stays square and causal."""
    tokens, segments = query.shape[2], len(keywords.get("segments") or keywords["cu_seqlens"][1:])
    ahead = (key.shape[2] - tokens) // segments
    layout = Layout.of(keywords, ahead, tokens)
    assert layout is not None
    return layout.insert(query, query.new_zeros(1, query.shape[1], ahead, query.shape[3]), dim=2), layout


def forward_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kinds: tuple[Family, ...], scale: float
) -> torch.Tensor:
    """(heads, tokens, dim) and twice (kv_heads, tokens, dim) -> (tokens, heads, dim), without a graph.

    Batched products around one pass of softmax, as in the backward: in bf16 torch's flash attention for CPUs takes three times as
    long. Scores are rounded to bf16 there, as transformers' eager attention does; SmolLM2-135M is as far from fp32 either way.
    """
    heads, tokens, dim = q.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype)
    for family in kinds:
        for run in family.runs:
            k_run, v_run = family.keys(k, run), family.keys(v, run)
            for here, seen in _blocks(run):
                p = _weights(q, k_run[:, :seen], here, scale)
                out[here] = torch.bmm(p, v_run[:, :seen]).view(heads, -1, dim).transpose(0, 1)
    return out


def _blocks(run: Run) -> Iterator[tuple[slice, int]]:
    """(some queries of a run, how many of its keys the last of them sees), ``ROWS`` queries at a time."""
    for first in range(0, run.length, ROWS):
        last = min(first + ROWS, run.length)
        yield slice(run.start + first, run.start + last), run.ahead + last


def _weights(q: torch.Tensor, k_seen: torch.Tensor, here: slice, scale: float) -> torch.Tensor:
    """softmax(scale q k^T) of the queries ``here``, the last of which sees all of ``k_seen`` (kv_heads, seen, dim).

    The query heads that share a key head are stacked along the rows: (kv_heads, group * rows, seen).
    """
    heads, rows, seen = q.shape[0], here.stop - here.start, k_seen.shape[1]
    p = torch.bmm(_stacked(q[:, here], len(k_seen)), k_seen.transpose(1, 2))
    kernels.call("causal_softmax", q.dtype, p, scale, heads, rows, seen)
    return p


def _stacked(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(heads, rows, dim) -> (kv_heads, group * rows, dim)."""
    return x.reshape(kv_heads, -1, x.shape[-1])


def backward_segments(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kinds: tuple[Family, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward_segments` for ``grad`` (tokens, heads, dim), laid out like q, k and v.

    With P = causal softmax(scale q k^T): dV = P^T dO; dP = dO V^T; dS = scale P (dP - rowsum(P dP)); dQ = dS K; dK = dS^T Q. P is
    made again from q and k, for ``ROWS`` queries at a time and only the keys they see: torch's flash backward for CPUs takes
    three to five times as long at a few hundred tokens, and no (length, length) matrix is ever held. What several blocks give a
    key is summed in fp32.
    """
    heads, _, dim = q.shape
    kv_heads = k.shape[0]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for family in kinds:
        whole = slice(family.start, family.start + family.length)
        several = len(family.runs) > 1 or family.length > ROWS
        sums = [torch.zeros(kv_heads, family.length, dim, dtype=torch.float32) for _ in range(2 * several)]
        for run in family.runs:
            own, k_run, v_run = run.start - family.start, family.keys(k, run), family.keys(v, run)
            for here, seen in _blocks(run):
                rows, k_seen = here.stop - here.start, k_run[:, :seen]
                grad_rows = _stacked(grad[here].transpose(0, 1), kv_heads)
                p = _weights(q, k_seen, here, scale)
                ds = torch.bmm(grad_rows, v_run[:, :seen].transpose(1, 2))
                dv_part = torch.bmm(p.transpose(1, 2), grad_rows)
                kernels.call("causal_softmax_backward", q.dtype, ds, p, scale, heads, rows, seen)
                dq[:, here] = torch.bmm(ds, k_seen).view(heads, rows, dim)
                dk_part = torch.bmm(ds.transpose(1, 2), _stacked(q[:, here], kv_heads))
                if not several:
                    dk[:, whole], dv[:, whole] = dk_part, dv_part
                for total, part in zip(sums, (dk_part, dv_part)):
                    total[:, : run.ahead] += part[:, : run.ahead]
                    total[:, own : own + seen - run.ahead] += part[:, run.ahead :]
        if several:
            dk[:, whole], dv[:, whole] = sums
    return dq, dk, dv


class CausalSegments(torch.autograd.Function):
    """:func:`forward_segments` with :func:`backward_segments`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kinds: tuple[Family, ...], scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.kinds, ctx.scale = kinds, scale
        return forward_segments(q, k, v, kinds, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        return *backward_segments(grad, q, k, v, ctx.kinds, ctx.scale), None, None
