"""Attention without a causal mask over packed rows: what encoders do. Every token of a segment sees every other of it.

On a CPU with the passes of kernels_encoder.c one call does all segments, forward or backward: rows of encoders are short, and a
call for each of them, or products over a padded block, cost several times the arithmetic. At 384 tokens too it takes half as long
as torch's calls. Elsewhere short segments go together, padded.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.models.fast import kernels

BLOCK = 64
"""Queries at a time, as in kernels_encoder.c."""

SHORT = 128
"""Tokens up to which segments of an encoder are attended to together, padded: single calls cost more than the padding."""


def by_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Attention without a causal mask: (heads, tokens, dim) three times -> (tokens, heads, dim).

    Short segments of like length go together, padded to the longest of them; what is padding has no weight.
    """
    starts = [0, *accumulate(segments)]
    order = sorted(range(len(segments)), key=lambda one: -segments[one])
    out = torch.empty(q.shape[1], q.shape[0], v.shape[2], dtype=v.dtype, device=v.device)
    parts, places = [], []
    while order:
        longest = segments[order[0]]
        fitting = [one for one in order if 2 * segments[one] > longest] if longest <= SHORT else order[:1]
        order = order[len(fitting) :]
        if len(fitting) == 1:
            here = slice(starts[fitting[0]], starts[fitting[0]] + longest)
            one = scaled_dot_product_attention(
                q[None, :, here],
                k[None, :, here],
                v[None, :, here],
                scale=scale,
                enable_gqa=q.shape[0] != k.shape[0],
            )
            parts.append(one[0].transpose(0, 1))
            places.append(torch.arange(starts[fitting[0]], starts[fitting[0]] + longest, device=q.device))
            continue
        lengths = torch.tensor([segments[one] for one in fitting], device=q.device)
        begin = torch.tensor([starts[one] for one in fitting], device=q.device)
        inside = torch.arange(longest, device=q.device)[None]
        real = inside < lengths[:, None]
        index = (begin[:, None] + torch.minimum(inside, lengths[:, None] - 1)).reshape(-1)
        asked, keys, values = (
            one[:, index].view(one.shape[0], len(fitting), longest, -1).transpose(0, 1) for one in (q, k, v)
        )
        hidden = ~real[:, None, None, :]
        parts.append(_padded(asked, keys, values, hidden, scale).transpose(1, 2)[real])
        places.append(index.view(real.shape)[real])
    if len(parts) == 1 and len(segments) == 1:
        return parts[0]
    return out.index_copy(0, torch.cat(places), torch.cat(parts))


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """(rows, heads, tokens, dim) of each; keys that are ``hidden`` (rows, 1, 1, tokens) get no weight."""
    if k.shape[1] != q.shape[1]:
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[int, ...], scale: float
) -> torch.Tensor:
    """(heads, tokens, dim) and twice (kv_heads, tokens, dim) -> (tokens, heads, dim)."""
    if not kernels.available(q) or v.shape[-1] != q.shape[-1]:
        return by_length(q, k, v, segments, scale)
    qkv = torch.cat([one.transpose(0, 1).flatten(1) for one in (q, k, v)], dim=1)
    out: torch.Tensor = BothWays.apply(qkv, q.shape[0], k.shape[0], segments, scale)
    return out.view(q.shape[1], q.shape[0], -1)


class BothWays(torch.autograd.Function):
    """qkv (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim). Weights are computed in fp32 and made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, heads: int, kv_heads: int, segments: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        qkv = qkv.contiguous()
        dim = qkv.shape[1] // (heads + 2 * kv_heads)
        out = qkv.new_empty(len(qkv), heads * dim)
        ctx.rest = _rest(segments, heads, kv_heads, dim, scale)
        ctx.save_for_backward(qkv)
        kernels.call("attend_both_ways", qkv.dtype, qkv, out, *ctx.rest)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (qkv,) = ctx.saved_tensors
        out = torch.empty_like(qkv)
        kernels.call("attend_both_ways_backward", qkv.dtype, qkv, grad.contiguous(), out, *ctx.rest)
        return out, None, None, None, None


def _rest(segments: tuple[int, ...], heads: int, kv_heads: int, dim: int, scale: float) -> tuple[Any, ...]:
    """The arguments that both passes share; among them room for each thread, as kernels_encoder.c divides it."""
    padded, wide = (-(-size // 16) * 16 for size in (max(segments), dim))
    room = 7 * padded * wide + 2 * BLOCK * padded + BLOCK * wide
    threads = torch.get_num_threads()
    edges = torch.tensor([0, *accumulate(segments)])
    return edges, torch.empty(threads * room), scale, len(segments), heads, kv_heads, dim, room, threads
