"""Attention of encoders over packed rows: each token attends to every token of its own segment.

On a CPU with kernels_encoder.c one call computes all segments, forward or backward. Encoder rows are short: a
torch call for each, or products over a padded block, cost several times the arithmetic; at 384 tokens our
pass still takes half as long as torch's. On other devices short segments are padded and computed together.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.models.fast import kernels
from tunesmith.models.fast.autograd_context import Context, Gradients

QUERY_BLOCK = 64
"""Queries at a time, as in kernels_encoder.c."""

SHORT = 128
"""Tokens up to which segments are padded and computed together: separate calls cost more than padding."""


def attend(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], scale: float) -> Tensor:
    """(heads, tokens, dim) and twice (kv_heads, tokens, dim) -> (tokens, heads, dim)."""
    if not kernels.available(q) or v.shape[-1] != q.shape[-1]:
        return attend_by_length(q, k, v, segments, scale)
    qkv = torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], dim=1)
    out: Tensor = BidirectionalAttention.apply(qkv, (q.shape[0], k.shape[0], segments, scale))
    return out.view(q.shape[1], q.shape[0], -1)


def attend_by_length(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], scale: float) -> Tensor:
    """Return what :func:`attend` returns, by torch's own functions.

    Short segments of similar length are padded to the longest of them and computed together; padding has no
    weight.
    """
    spans = sorted(zip(accumulate(segments, initial=0), segments), key=lambda span: -span[1])
    grouped = q.shape[0] != k.shape[0]
    parts, positions = [], []
    while spans:
        start, longest = spans[0]
        similar = [span for span in spans if 2 * span[1] > longest] if longest <= SHORT else spans[:1]
        spans = spans[len(similar) :]
        if len(similar) == 1:
            one = [x[None, :, start : start + longest] for x in (q, k, v)]
            part = scaled_dot_product_attention(one[0], one[1], one[2], scale=scale, enable_gqa=grouped)
            parts.append(part[0].transpose(0, 1))
            positions.append(torch.arange(start, start + longest, device=q.device))
            continue
        begin, lengths = torch.tensor(similar, device=q.device).T[:, :, None]  # (segments, 1) each
        column = torch.arange(longest, device=q.device)[None]
        real = column < lengths  # (segments, longest)
        index = (begin + torch.minimum(column, lengths - 1)).reshape(-1)
        padded = [x[:, index].view(len(x), len(similar), longest, -1).transpose(0, 1) for x in (q, k, v)]
        part = _attend_padded(padded, ~real[:, None, None, :], scale)
        parts.append(part.transpose(1, 2)[real])
        positions.append(index.view(real.shape)[real])
    if len(segments) == 1:
        return parts[0]
    out = torch.empty(q.shape[1], q.shape[0], v.shape[2], dtype=v.dtype, device=v.device)
    return out.index_copy(0, torch.cat(positions), torch.cat(parts))


def _attend_padded(qkv: list[Tensor], padding: Tensor, scale: float) -> Tensor:
    """Attention over (rows, heads, tokens, dim); keys at ``padding`` (rows, 1, 1, tokens) have no weight."""
    q, k, v = qkv
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    return scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(-1) @ v


Settings = tuple[int, int, tuple[int, ...], float]
"""Heads, key heads, segments and scale."""


class BidirectionalAttention(torch.autograd.Function):
    """qkv (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim). Backward computes the weights again."""

    @staticmethod
    def forward(ctx: Context[Settings], qkv: Tensor, settings: Settings) -> Tensor:
        heads, kv_heads, _, _ = ctx.kept = settings
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), heads * (qkv.shape[1] // (heads + 2 * kv_heads)))
        ctx.save_for_backward(qkv)
        _call("bidirectional_attention", settings, qkv, out)
        return out

    @staticmethod
    def backward(ctx: Context[Settings], grad: Tensor) -> Gradients:
        (qkv,) = ctx.saved_tensors
        out = torch.empty_like(qkv)
        _call("bidirectional_attention_backward", ctx.kept, qkv, grad.contiguous(), out)
        return out, None


def _call(name: str, settings: Settings, qkv: Tensor, *others: Tensor) -> None:
    """Call a C pass with scratch memory for each thread, as kernels_encoder.c divides it."""
    heads, kv_heads, segments, scale = settings
    dim, threads = qkv.shape[1] // (heads + 2 * kv_heads), torch.get_num_threads()
    padded, wide = (-(-size // 16) * 16 for size in (max(segments), dim))
    room = 7 * padded * wide + 2 * QUERY_BLOCK * padded + QUERY_BLOCK * wide
    edges, scratch = torch.tensor([0, *accumulate(segments)]), torch.empty(threads * room)
    shared = (edges, scratch, scale, len(segments), heads, kv_heads, dim, room, threads)
    kernels.call(name, qkv.dtype, qkv, *others, *shared)
