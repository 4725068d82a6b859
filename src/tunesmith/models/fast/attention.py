"""Attention over packed rows: several sequences side by side in one row, each seeing only itself.

A model calls it once per layer through transformers' ``AttentionInterface``; the segment lengths arrive as
the keyword ``segments`` of its forward. It refuses whatever else a model passes to attention (a sliding
window shorter than a segment, a soft cap, a position bias): the caller then pads. With the keyword
``behind`` answers share a prefix (``segments.py``).

It serves CPUs, fp32 on a GPU, and GPUs before Ampere; ``varlen.py`` serves other GPUs. On a CPU with
``kernels.py`` both passes are our own, elsewhere there is one ``scaled_dot_product_attention`` call for each
segment: one call with a block-diagonal mask would compute all pairs of tokens of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tunesmith.models.adapters.virtual_token_layout import Keywords, Layout
from tunesmith.models.fast import bidirectional_attention, kernels
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.segments import Family, Run, families, most_keys
from tunesmith.models.network import attribute

NAME = "tunesmith_segments"
ROWS = {torch.float32: 64, torch.bfloat16: 256}
"""Most queries whose attention weights exist at the same time, where ``in_c`` is false.

Fewer of them multiply fewer keys that their mask hides, by smaller products. Forward and backward of 220
tokens on a core with AVX2 take 4.5 ms by 64 and 6.8 ms by 256 in fp32; in bf16 4.0 and 3.3 ms.
"""
HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "cache_position", "layer_idx", "is_causal",
    "past_key_values", "read", "output_router_logits", "deterministic", "token_type_ids",
}  # fmt: skip
"""Keywords of transformers that attention functions ignore: models pass on all keywords of their forward."""

_watchers: list[list[int | None]] = []


@contextmanager
def watch() -> Iterator[list[int | None]]:
    """Yield a list that gets one entry for each call of packed attention: its sliding window, or None."""
    calls: list[int | None] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.remove(calls)


def report_call(sliding_window: int | None) -> None:
    """Append to the list of every :func:`watch`."""
    for calls in _watchers:
        calls.append(sliding_window)


class CannotPack(Exception):
    """The model's attention needs something that packed rows cannot compute exactly."""


def register() -> None:
    """Make ``attn_implementation="tunesmith_segments"`` known to transformers.

    No mask function is registered: one that returns None would make transformers wait for the device on every call.
    """
    AttentionInterface.register(NAME, segment_attention)


def check_arguments(
    query: Tensor,
    attention_mask: Tensor | None,
    has_segments: bool,
    dropout: float,
    others: Mapping[str, object],
) -> None:
    """Raise CannotPack for arguments and ``others`` (keywords) that packed attention does not support."""
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise CannotPack(f"its attention uses {', '.join(unknown)}")
    if not has_segments or attention_mask is not None or query.shape[0] != 1:
        raise CannotPack("its forward does not pass the segments on to attention")
    if dropout:
        raise CannotPack("its attention drops probabilities at random")


def check_shared_prefix(causal: bool, virtual: int) -> None:
    """Raise CannotPack where answers cannot share a prefix. ``virtual``: the number of virtual keys."""
    if not causal:
        raise CannotPack("answers share a prefix only where attention is causal")
    if virtual:
        raise CannotPack("answers cannot share a prefix that follows virtual tokens")


def is_causal(module: torch.nn.Module, others: Mapping[str, object]) -> bool:
    """Return whether attention is causal, by the call's keywords ``others``, else by the module."""
    causal = others.get("is_causal")
    causal = attribute(module, "is_causal") if causal is None else causal
    return causal is None or bool(causal)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[int, ...] | None = None,
    behind: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return attention within each segment and to its prefix segment (``behind``), (1, tokens, heads, dim).

    ``query`` (1, heads, tokens, dim), ``key`` and ``value`` (1, kv_heads, tokens, dim); the lengths in
    ``segments`` sum to tokens. Where there are more keys than queries, each segment has equally many virtual
    keys in front. Raises CannotPack for arguments that it does not support.
    """
    check_arguments(query, attention_mask, segments is not None, dropout, kwargs)
    assert segments is not None
    causal = is_causal(module, kwargs)
    if behind is not None:
        check_shared_prefix(causal, key.shape[2] - query.shape[2])
    if not causal and sliding_window is not None:
        sliding_window //= 2  # to either side
    if key.shape[2] != query.shape[2]:  # virtual keys: the same attention over longer segments
        query, layout = insert_virtual_queries(query, key, causal, {"segments": segments})
        longer = {"scaling": scaling, "sliding_window": sliding_window, **layout.keywords}
        return layout.text(segment_attention(module, query, key, value, None, **longer)[0]), None
    most = most_keys(segments, behind)
    if sliding_window is not None and sliding_window < most:
        raise CannotPack(f"its attention slides over {sliding_window} tokens and a row has {most}")
    report_call(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not causal:
        return bidirectional_attention.attend(query[0], key[0], value[0], segments, scale).unsqueeze(0), None
    grouped = families(segments, behind)
    if kernels.available(query) and value.shape[-1] == query.shape[-1]:
        qkv = (x[0].contiguous() for x in (query, key, value))
        return CausalSegments.apply(*qkv, grouped, scale).unsqueeze(0), None
    return attend_by_torch(query, key, value, grouped, scale).transpose(1, 2).contiguous(), None


def attend_by_torch(
    query: Tensor, key: Tensor, value: Tensor, grouped: tuple[Family, ...], scale: float
) -> Tensor:
    """Return causal attention by torch's own function, one call for each run. (1, heads, tokens, dim)."""
    exact = torch.promote_types(key.dtype, torch.float32)
    enable_gqa, parts = query.shape[1] != key.shape[1], []
    for family in grouped:
        # what several runs see goes through fp32, in which autograd then sums the gradients of the runs
        prefix = slice(family.start, family.start + family.runs[-1].ahead)
        shared = [x[:, :, prefix].to(exact) for x in (key, value)]
        for run in family.runs:
            here = slice(run.start, run.start + run.length)
            q, k, v = (x[:, :, here] for x in (query, key, value))
            mask = None
            if run.ahead:
                pairs = zip(shared, (k, v), strict=True)
                k, v = (torch.cat([ahead.to(x.dtype), x], dim=2) for ahead, x in pairs)
                mask = torch.ones(run.length, run.keys, dtype=torch.bool, device=q.device).tril(run.ahead)
            parts.append(
                scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
                )
            )
    return torch.cat(parts, dim=2)


def insert_virtual_queries(
    query: Tensor, key: Tensor, causal: bool, keywords: Keywords
) -> tuple[Tensor, Layout]:
    """Insert zero queries for the virtual keys of each segment, so that attention stays square and causal."""
    if not causal:
        raise CannotPack("virtual keys need causal attention")
    tokens, segments = query.shape[2], len(keywords.get("segments") or keywords["cu_seqlens"][1:])
    ahead = (key.shape[2] - tokens) // segments
    layout = Layout.of(keywords, ahead, tokens)
    assert layout is not None
    return layout.insert(query, query.new_zeros(1, query.shape[1], ahead, query.shape[3]), dim=2), layout


def in_c(q: Tensor) -> bool:
    """Return whether ``kernels_attention.c`` computes attention of these queries."""
    return q.dtype is torch.float32 and q.shape[-1] % 16 == 0


@lru_cache(maxsize=64)
def _tables(grouped: tuple[Family, ...]) -> tuple[Tensor, Tensor]:
    """Return what C reads: of each run its start, length, keys ahead and their start; the first run of each family."""
    runs = [(run.start, run.length, run.ahead, family.start) for family in grouped for run in family.runs]
    return torch.tensor(runs), torch.tensor([0, *accumulate(len(family.runs) for family in grouped)])


def forward_segments(
    q: Tensor, k: Tensor, v: Tensor, grouped: tuple[Family, ...], scale: float
) -> tuple[Tensor, Tensor | None]:
    """(heads, tokens, dim) and twice (kv_heads, tokens, dim) -> (tokens, heads, dim), without a graph.

    Where C computes it, also returns what the backward pass needs for each query, (heads, tokens, 2), else None. In bf16 there
    are batched products around one softmax pass, because torch's flash attention for CPUs takes three times as long. Scores are
    rounded to bf16, as in transformers' eager attention.
    """
    heads, tokens, dim = q.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype)
    if in_c(q):
        (runs, _), norms = _tables(grouped), q.new_empty(heads, tokens, 2)
        sizes = len(runs), heads, len(k), tokens, dim
        kernels.call_in_memory("causal_attention", None, q, k, v, out, norms, runs, scale, *sizes)
        return out, norms
    for family in grouped:
        for run in family.runs:
            k_run, v_run = family.keys(k, run), family.keys(v, run)
            for here, seen in _blocks(run, q.dtype):
                p = _weights(q, k_run[:, :seen], here, scale)
                out[here] = torch.bmm(p, v_run[:, :seen]).view(heads, -1, dim).transpose(0, 1)
    return out, None


def _blocks(run: Run, dtype: torch.dtype) -> Iterator[tuple[slice, int]]:
    """Yield blocks of at most ``ROWS`` queries of a run, each with the number of keys that its last query sees.

    They are about equally long, because a product with few rows is slow, and multiples of a vector of 16 numbers.
    """
    count = -(-run.length // ROWS[dtype])
    rows = -(-run.length // (16 * count)) * 16
    for first in range(0, run.length, rows):
        last = min(first + rows, run.length)
        yield slice(run.start + first, run.start + last), run.ahead + last


def _weights(q: Tensor, k_seen: Tensor, here: slice, scale: float) -> Tensor:
    """softmax(scale q k^T) of the queries ``here``; the last sees all of ``k_seen`` (kv_heads, seen, dim).

    The query heads that share a key head are stacked along the rows: (kv_heads, group * rows, seen).
    """
    heads, rows, seen = q.shape[0], here.stop - here.start, k_seen.shape[1]
    p = torch.bmm(_stacked(q[:, here], len(k_seen)), k_seen.transpose(1, 2))
    kernels.call("causal_softmax", q.dtype, p, scale, heads, rows, seen)
    return p


def _stacked(x: Tensor, kv_heads: int) -> Tensor:
    """(heads, rows, dim) -> (kv_heads, group * rows, dim)."""
    return x.reshape(kv_heads, -1, x.shape[-1])


def backward_segments(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: Tensor | None,
    grouped: tuple[Family, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`forward_segments` by q, k and v for ``grad`` (tokens, heads, dim) and its ``norms``.

    With P = causal softmax(scale q k^T): dV = P^T dO; dP = dO V^T; dS = scale P (dP - rowsum(P dP));
    dQ = dS K; dK = dS^T Q. P is computed again, for ``ROWS`` queries at a time and the keys they see: torch's
    flash backward for CPUs takes three to five times as long. Sums over blocks are in fp32.
    """
    heads, _, dim = q.shape
    kv_heads = k.shape[0]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if norms is not None:
        (runs, edges), (dks, dvs) = _tables(grouped), torch.empty(2, *q.shape)
        gradients = grad.contiguous(), norms, dq, dk, dv, dks, dvs, runs, edges
        sizes = len(grouped), heads, kv_heads, q.shape[1], dim
        kernels.call_in_memory("causal_attention_backward", None, q, k, v, *gradients, scale, *sizes)
        return dq, dk, dv
    for family in grouped:
        whole = slice(family.start, family.start + family.length)
        several = len(family.runs) > 1 or family.length > ROWS[q.dtype]
        sums = [torch.zeros(kv_heads, family.length, dim, dtype=torch.float32) for _ in range(2 * several)]
        for run in family.runs:
            own, k_run, v_run = run.start - family.start, family.keys(k, run), family.keys(v, run)
            for here, seen in _blocks(run, q.dtype):
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


Kept = tuple[tuple[Family, ...], float]


class CausalSegments(torch.autograd.Function):
    """:func:`forward_segments` with :func:`backward_segments`."""

    @staticmethod
    def forward(
        ctx: Context[Kept], q: Tensor, k: Tensor, v: Tensor, grouped: tuple[Family, ...], scale: float
    ) -> Tensor:
        out, norms = forward_segments(q, k, v, grouped, scale)
        ctx.save_for_backward(q, k, v, norms)
        ctx.kept = grouped, scale
        return out

    @staticmethod
    def backward(ctx: Context[Kept], grad: Tensor) -> Gradients:
        q, k, v, norms = ctx.saved_tensors
        grouped, scale = ctx.kept
        return *backward_segments(grad, q, k, v, norms, grouped, scale), None, None
