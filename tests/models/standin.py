"""torch's ``varlen_attn`` in plain torch: same signature, any device and dtype, one attention call for each segment."""

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
    assert cu_seq_k is not None and len(cu_seq_k) == len(cu_seq_q)
    assert all(ends.dtype is torch.int32 and ends.is_contiguous() for ends in (cu_seq_q, cu_seq_k))
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0 or (left, right) == (-1, -1), "causal, or both ways"
    parts = []
    spans, spans_k = list(pairwise(cu_seq_q.tolist())), list(pairwise(cu_seq_k.tolist()))
    assert spans[-1][1] == len(query) and spans_k[-1][1] == len(key) == len(value)
    assert (max_q, max_k) == tuple(max(end - start for start, end in some) for some in (spans, spans_k))
    for (start, end), (start_k, end_k) in zip(spans, spans_k, strict=True):
        q, k, v = (x[part].transpose(0, 1)[None] for x, part in ((query, slice(start, end)), (key, slice(start_k, end_k)), (value, slice(start_k, end_k))))  # fmt: skip
        ahead = (end_k - start_k) - (end - start)  # the last query stands where the last key stands
        distance = torch.arange(end - start)[:, None] + ahead - torch.arange(end_k - start_k)[None, :]
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
    assert cu_seq_k is not None

    def owner_and_place(tokens: int, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequence of each token, and its distance from the end of that sequence."""
        token, ends = torch.arange(tokens, device=query.device), ends.long()
        owner = torch.searchsorted(ends, token, right=True)
        return owner, token - ends[owner]

    (owner, place), (owner_k, place_k) = owner_and_place(query.shape[0], cu_seq_q), owner_and_place(key.shape[0], cu_seq_k)
    distance = place[:, None] - place_k[None, :]
    seen = owner[:, None] == owner_k[None, :]
    if window_size[1] == 0:
        seen = seen & (distance >= 0)
    if window_size[0] >= 0:
        seen = seen & (distance <= window_size[0])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)
