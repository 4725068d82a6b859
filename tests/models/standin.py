"""torch's ``varlen_attn`` in plain torch: the same signature, any device and dtype, one attention call for each segment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """(tokens, heads, dim); what FlashAttention asserts of its input is asserted here too."""
    assert cu_seq_q.dtype is torch.int32 and cu_seq_k is cu_seq_q and cu_seq_q.is_contiguous()
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0 or (left, right) == (-1, -1), "causal, or both ways"
    parts = []
    ends = cu_seq_q.tolist()
    assert max_q == max_k == max(end - start for start, end in pairwise(ends))
    for start, end in pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        seen = ((distance >= 0) if right == 0 else (distance == distance)) & ((distance <= left) if left >= 0 else True)
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(parts)


def traceable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The same with one mask and no number taken from a tensor, so that a compiler can follow it (the real one is opaque to it)."""
    place = torch.arange(query.shape[0], device=query.device)
    owner = torch.searchsorted(cu_seq_q.long(), place, right=True)
    distance = place[:, None] - place[None, :]
    seen = owner[:, None] == owner[None, :]
    if window_size[1] == 0:
        seen = seen & (distance >= 0)
    if window_size[0] >= 0:
        seen = seen & (distance <= window_size[0])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)
