"""Packed attention on a GPU: one call of torch's ``varlen_attn`` (FlashAttention 2) for all segments.

Registered with transformers under ``tunesmith_varlen``. It takes two keywords made once for each batch:
``cu_seqlens`` (segments + 1,), int32 on the device, the boundaries of the segments, and ``longest``, the
tokens of the longest one. So no layer waits for the device, and a compiled layer sees a tensor of varying
length, not a tuple for which it would be compiled again. Sliding windows are exact here.

Where answers share a prefix (``segments.py``) three more keywords hold the keys of all runs and their
boundaries. The kernel aligns the last query with the last key, as an answer after a prefix needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface

from tunesmith.models.adapters.virtual_token_layout import Keywords
from tunesmith.models.fast import attention
from tunesmith.models.fast.attention import CannotPack
from tunesmith.models.fast.segments import families

NAME = "tunesmith_varlen"
HALVES = (torch.float16, torch.bfloat16)
TEST_SCALE = 0.1
TOLERANCE = 2e-2
"""Largest difference from plain attention in the self-test, as a share of the norm. bf16 has 8 bits: 4e-3."""

Kernel: TypeAlias = Callable[..., Any]
"""A function with the signature of torch's ``varlen_attn``; by default it returns (tokens, heads, dim)."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot serve ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for a {device.type} device"
    if torch.version.hip is not None:
        return "it is untested with ROCm"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if dtype not in HALVES:
        return f"it takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None if major >= 8 else f"it needs compute capability 8.0 (Ampere), and this GPU has {major}.{minor}"
    )


def heads_fit(dim: int, value_dim: int, capability: tuple[int, int]) -> bool:
    """Return whether the kernel takes heads of ``dim`` numbers: multiples of 8 up to 256, as in the values.

    Above 192 its backward needs more shared memory than some GPUs have (8.6, 8.9, 12.0).
    """
    if dim != value_dim or dim % 8 or dim > 256:
        return False
    return dim <= 192 or capability not in ((8, 6), (8, 9), (12, 0), (12, 1))


def boundaries(
    segments: tuple[int, ...], device: torch.device, behind: tuple[int, ...] | None = None
) -> Keywords:
    """Return the keywords of :func:`attend` for a packed batch, sent to ``device`` without waiting for it.

    Where several answers share a prefix also ``key_places`` int64 (keys,), the tokens whose keys the kernel
    takes, prefixes once for each answer, and ``cu_seqlens_k`` and ``longest_k`` of these.
    """
    pairs = [(family, run) for family in families(segments, behind) for run in family.runs]
    lengths, keys = [run.length for _, run in pairs], [run.keys for _, run in pairs]
    keywords = {"cu_seqlens": _send(_ends(lengths), device), "longest": max(lengths)}
    if keys != lengths:
        tokens = torch.arange(sum(segments))[None]
        places = torch.cat([family.keys(tokens, run) for family, run in pairs], dim=1)[0]
        keywords |= {"key_places": _send(places, device), "cu_seqlens_k": _send(_ends(keys), device)}
        keywords["longest_k"] = max(keys)
    return keywords


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _send(numbers: Tensor, device: torch.device) -> Tensor:
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


@lru_cache
def torch_kernel() -> Kernel:
    """Return torch's function for grouped heads."""
    from torch.nn.attention.varlen import varlen_attn  # loads the compiler, which takes a second

    return with_gqa(varlen_attn)


def with_gqa(kernel: Kernel) -> Kernel:
    """Return ``kernel`` for fewer key heads than query heads; torch 2.11 needs no ``enable_gqa`` for them."""
    has_switch = "enable_gqa" in inspect.signature(kernel).parameters
    return partial(kernel, enable_gqa=True) if has_switch else kernel


def register(kernel: Kernel, capability: tuple[int, int]) -> None:
    """Make ``attn_implementation="tunesmith_varlen"`` known to transformers, like ``attention.register``."""
    AttentionInterface.register(NAME, attend_with(kernel, capability))


def attend_with(kernel: Kernel, capability: tuple[int, int]) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function that transformers calls once a layer. It never waits for the device."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seqlens: Tensor | None = None,
        longest: int = 0,
        cu_seqlens_k: Tensor | None = None,
        longest_k: int = 0,
        key_places: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Return attention inside each segment, in the shapes of ``segment_attention``. Raises CannotPack."""
        attention.check_arguments(query, attention_mask, cu_seqlens is not None, dropout, kwargs)
        if not heads_fit(query.shape[-1], value.shape[-1], capability):
            raise CannotPack(
                f"its heads have {query.shape[-1]} numbers, which varlen_attn has no kernel for on this GPU"
            )
        causal = attention.is_causal(module, kwargs)
        if not causal and sliding_window is not None:
            raise CannotPack("its attention slides to both sides")
        attention.report_call(sliding_window)
        if key_places is not None:
            attention.check_shared_prefix(causal, key.shape[2] - query.shape[2])
        layout = None
        if key.shape[2] != query.shape[2]:
            given = {"cu_seqlens": cu_seqlens, "longest": longest}
            query, layout = attention.insert_virtual_queries(query, key, causal, given)
            cu_seqlens, longest = layout.keywords["cu_seqlens"], layout.keywords["longest"]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if key_places is None:
            cu_seqlens_k, longest_k = cu_seqlens, longest
        else:
            k, v = gather_keys(k, key_places), gather_keys(v, key_places)
        size = _window_size(sliding_window, causal)
        out = kernel(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, scale=scaling, window_size=size)
        return (out if layout is None else layout.text(out, dim=0)).unsqueeze(0), None

    return attend


def _window_size(window: int | None, causal: bool) -> tuple[int, int]:
    """(left, right) for the kernel; a window of w tokens is the token itself and w - 1 before it."""
    return -1 if window is None else window - 1, 0 if causal else -1


def gather_keys(x: Tensor, places: Tensor) -> Tensor:
    """``x`` (tokens, heads, dim) at ``places``, through fp32: gradients of shared keys are summed in it."""
    return x.float().index_select(0, places).to(x.dtype)


Case: TypeAlias = tuple[int | None, bool, tuple[int, ...] | None]
"""Sliding window, whether attention is causal, and ``behind``."""


def self_test(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how the kernel and its gradients differ from plain attention on a small random input, or None.

    The parity check of ``train.fast_path`` sees at most 192 tokens of a row, fewer than most windows.
    """
    generator = torch.Generator().manual_seed(0)
    lengths, dim = (37, 5, 90), 64
    q, k, v, grad = (
        torch.randn(sum(lengths), heads, dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2, 4)
    )
    cases: list[Case] = [(None, True, None), (16, True, None), (None, False, None)]
    cases += [(window, True, (-1, 0, 0)) for window in (None, 64)]
    for case in cases:
        window, causal, behind = case
        given = boundaries(lengths, device, behind)
        cuts, longest, keys, values = given["cu_seqlens"], given["longest"], k, v
        if behind is not None:
            keys, values = (gather_keys(x, given["key_places"]) for x in (k, v))
        ends = cuts, given.get("cu_seqlens_k", cuts), longest, given.get("longest_k", longest)
        ours = kernel(q, keys, values, *ends, scale=TEST_SCALE, window_size=_window_size(window, causal))
        theirs = plain_attention([x.float() for x in (q, k, v)], lengths, case)
        gradients = (torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)) for out in (ours, theirs))
        for got, expected in [(ours.detach(), theirs.detach()), *zip(*gradients, strict=True)]:
            difference = float((got.float() - expected.float()).norm() / expected.float().norm())
            if not difference <= TOLERANCE:
                which = "with a sliding window" if window else "without a sliding window"
                which = which if causal else "bidirectional"
                return f"by {difference:.1e}, {which}{', behind a prefix' if behind else ''}"
    return None


def plain_attention(qkv: list[Tensor], lengths: tuple[int, ...], case: Case) -> Tensor:
    """Return the same attention by its formula, softmax(scale q k^T + mask) v, over (tokens, heads, dim)."""
    window, causal, behind = case
    q, k, v = (x.transpose(0, 1) for x in qkv)
    group = len(q) // len(k)
    parts = []
    for family in families(lengths, behind):
        for run in family.runs:
            keys, values = (family.keys(x, run).repeat_interleave(group, dim=0) for x in (k, v))
            query = torch.arange(run.length, device=q.device)[:, None] + run.ahead
            distance = query - torch.arange(run.keys, device=q.device)[None]
            unseen = ((distance < 0) & causal) | (window is not None and distance >= window)
            scores = q[:, run.start : run.start + run.length] @ keys.transpose(1, 2) * TEST_SCALE
            parts.append(scores.masked_fill(unseen, float("-inf")).softmax(-1) @ values)
    return torch.cat(parts, dim=1).transpose(0, 1)
