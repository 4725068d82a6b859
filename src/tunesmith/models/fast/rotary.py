"""Rotary embedding and causal attention over packed rows in one autograd function, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.models.adapters.virtual_tokens import PrefixCache
from tunesmith.models.fast import kernels
from tunesmith.models.fast.attention import backward_segments, forward_segments
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.segments import Family, families

Kept = tuple[int, int, tuple[Family, ...], float]
"""Heads, key heads, families and scale."""


def rotary_attention(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    kv_heads: int,
    segments: tuple[int, ...],
    scale: float,
    prefix: PrefixCache | None = None,
    behind: tuple[int, ...] | None = None,
) -> Tensor:
    """qkv (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim).

    With a ``prefix`` before each segment, the segments are longer and the output of its rows is dropped.
    """
    layout = None if prefix is None else prefix.layout
    if prefix is None or layout is None:
        settings = heads, kv_heads, families(segments, behind), scale
        out: Tensor = RotaryAttention.apply(qkv, cosine, sine, settings)
        return out
    settings = heads, kv_heads, families(layout.keywords["segments"]), scale
    return layout.text(RotaryAttention.apply(*prefix.extend(qkv, cosine, sine), settings), dim=0)


class RotaryAttention(torch.autograd.Function):
    """Rotary embedding and causal attention: (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim)."""

    @staticmethod
    def forward(ctx: Context[Kept], qkv: Tensor, cosine: Tensor, sine: Tensor, settings: Kept) -> Tensor:
        heads, kv_heads, grouped, scale = ctx.kept = settings
        (tokens, width), dim = qkv.shape, cosine.shape[-1]
        q, k, v = (qkv.new_empty(n, tokens, dim) for n in (heads, kv_heads, kv_heads))
        for source, target, count in ((qkv, q, heads), (qkv[:, heads * dim :], k, kv_heads)):
            kernels.call("rotary", qkv.dtype, source, target, cosine, sine, count, tokens, dim, width, 1)
        v.copy_(qkv[:, (heads + kv_heads) * dim :].view(tokens, kv_heads, dim).transpose(0, 1))
        out, norms = forward_segments(q, k, v, grouped, scale)
        ctx.save_for_backward(q, k, v, norms, cosine, sine)
        return out.view(tokens, heads * dim)

    @staticmethod
    def backward(ctx: Context[Kept], grad: Tensor) -> Gradients:
        q, k, v, norms, cosine, sine = ctx.saved_tensors
        heads, kv_heads, grouped, scale = ctx.kept
        tokens, dim = q.shape[1:]
        dq, dk, dv = backward_segments(grad.view(tokens, heads, dim), q, k, v, norms, grouped, scale)
        width = (heads + 2 * kv_heads) * dim
        out = grad.new_empty(tokens, width)
        for target, source, count in ((out, dq, heads), (out[:, heads * dim :], dk, kv_heads)):
            kernels.call("rotary", grad.dtype, target, source, cosine, sine, count, tokens, dim, width, -1)
        out[:, (heads + kv_heads) * dim :].view(tokens, kv_heads, dim).copy_(dv.transpose(0, 1))
        return out, None, None, None
