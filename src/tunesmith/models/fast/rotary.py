"""Rotary embedding and causal attention over packed rows in one autograd function, for CPUs: what fused attention layers call."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.models.adapters.virtual_tokens import Prefix
from tunesmith.models.fast import kernels
from tunesmith.models.fast.attention import backward_segments, forward_segments
from tunesmith.models.fast.segments import Family, families


def rotary_attention(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    heads: int,
    kv_heads: int,
    segments: tuple[int, ...],
    scale: float,
    prefix: Prefix | None = None,
    behind: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """qkv (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim); ``prefix``: virtual keys and values before each segment.

    With a prefix attention is that of longer segments: its rows have no query and are not rotated, and their output is left out.
    """
    if prefix is None or prefix.layout is None:
        out: torch.Tensor = RotaryAttention.apply(
            qkv, cosine, sine, heads, kv_heads, families(segments, behind), scale
        )
        return out
    longer = prefix.layout.keywords["segments"]
    out = RotaryAttention.apply(*prefix.spread(qkv, cosine, sine), heads, kv_heads, families(longer), scale)
    return prefix.layout.text(out, dim=0)


class RotaryAttention(torch.autograd.Function):
    """Rotary embedding and causal attention. qkv (tokens, (heads + 2 kv_heads) dim) -> (tokens, heads dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        heads: int,
        kv_heads: int,
        kinds: tuple[Family, ...],
        scale: float,
    ) -> torch.Tensor:
        tokens, dim = qkv.shape[0], cosine.shape[-1]
        ctx.shape = (heads, kv_heads, tokens, dim, qkv.shape[1])
        q, k, v = (qkv.new_empty(n, tokens, dim) for n in (heads, kv_heads, kv_heads))
        kernels.call("rotary", qkv.dtype, qkv, q, cosine, sine, heads, tokens, dim, qkv.shape[1], 1)
        kernels.call(
            "rotary",
            qkv.dtype,
            qkv[:, heads * dim :],
            k,
            cosine,
            sine,
            kv_heads,
            tokens,
            dim,
            qkv.shape[1],
            1,
        )
        v.copy_(qkv[:, (heads + kv_heads) * dim :].view(tokens, kv_heads, dim).transpose(0, 1))
        ctx.save_for_backward(q, k, v, cosine, sine)
        ctx.kinds, ctx.scale = kinds, scale
        return forward_segments(q, k, v, kinds, scale).view(tokens, heads * dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, cosine, sine = ctx.saved_tensors
        heads, kv_heads, tokens, dim, width = ctx.shape
        dq, dk, dv = backward_segments(grad.view(tokens, heads, dim), q, k, v, ctx.kinds, ctx.scale)
        out = grad.new_empty(tokens, width)
        kernels.call("rotary", grad.dtype, out, dq, cosine, sine, heads, tokens, dim, width, -1)
        kernels.call(
            "rotary", grad.dtype, out[:, heads * dim :], dk, cosine, sine, kv_heads, tokens, dim, width, -1
        )
        out[:, (heads + kv_heads) * dim :].view(tokens, kv_heads, dim).copy_(dv.transpose(0, 1))
        return out, None, None, None, None, None, None
