"""Packed attention on a GPU: one kernel call for all segments of a row (torch's ``varlen_attn``, which is FlashAttention 2).

Registered with transformers under ``tunesmith_varlen``. Where ``attention.segment_attention`` gets the segments' lengths, a tuple
on the host, this one gets two keywords made once for each batch: ``cu_seqlens`` (segments + 1,), int32 on the device, the places
where segments begin and end, and ``longest``, tokens of the longest one. So no layer waits for the device, and a compiled layer
sees a tensor of varying length instead of a tuple that it would be compiled anew for. Sliding windows are exact here.

Where answers share a prefix (``pieces.py``) a run of queries sees more keys than its own: three more keywords say which keys,
and where they begin and end. The kernel aligns the last query with the last key, as an answer behind a prefix needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface

from tunesmith.models.fast import attention
from tunesmith.models.fast.attention import CannotPack
from tunesmith.models.fast.segments import families

NAME = "tunesmith_varlen"
HALVES = (torch.float16, torch.bfloat16)
AGREEMENT = 2e-2
"""Of the self-test: largest difference from plain attention in half precision, of the norm. bf16 has 8 bits: 4e-3."""

Kernel = Callable[..., Any]
"""Has the signature of torch's ``varlen_attn`` and, asked for nothing else, returns a tensor (tokens, heads, dim)."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve tensors of ``dtype`` on ``device``, or None: what it asserts itself (Ampere, half types)."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for a {device.type} device"
    if torch.version.hip is not None:
        return "it was never tried with ROCm"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if dtype not in HALVES:
        return f"it takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None if major >= 8 else f"it needs compute capability 8.0 (Ampere), and this GPU has {major}.{minor}"
    )


def heads_fit(dim: int, value_dim: int, capability: tuple[int, int]) -> bool:
    """Whether heads of ``dim`` numbers go through the kernel: multiples of 8 up to 256, as many in the values.

    Above 192 its backward needs more shared memory than some GPUs have (8.6, 8.9, 12.0: torch's own dispatch refuses these too).
    """
    if dim != value_dim or dim % 8 or dim > 256:
        return False
    return dim <= 192 or capability not in ((8, 6), (8, 9), (12, 0), (12, 1))


def boundaries(
    segments: tuple[int, ...], device: torch.device, behind: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The keywords of :func:`attend` for one packed batch; sent to ``device`` without waiting for it.

    Where an answer is ``behind`` a prefix that another one is behind too: ``key_places`` int64 (keys,), the tokens whose keys the
    kernel gets, prefixes once for each answer; ``cu_seqlens_k`` and ``longest_k`` of these.
    """
    kinds = families(segments, behind)
    runs = [run for family in kinds for run in family.runs]
    made = {
        "cu_seqlens": _sent(_ends([run.length for run in runs]), device),
        "longest": max(run.length for run in runs),
    }
    if any(run.ahead for run in runs):
        tokens = torch.arange(sum(segments))[None]
        places = torch.cat([family.keys(tokens, run) for family in kinds for run in family.runs], dim=1)[0]
        made["key_places"] = _sent(places, device)
        made["cu_seqlens_k"] = _sent(_ends([run.keys for run in runs]), device)
        made["longest_k"] = max(run.keys for run in runs)
    return made


def _ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


@lru_cache
def torch_kernel() -> Kernel:
    """torch's function, with ``enable_gqa`` where it has that switch: torch 2.11 has none and takes grouped heads as they are."""
    from torch.nn.attention.varlen import (
        varlen_attn,  # it loads the compiler: a second that a CPU need not spend
    )

    return with_gqa(varlen_attn)


def with_gqa(kernel: Kernel) -> Kernel:
    """``kernel`` for fewer key heads than query heads."""
    if "enable_gqa" not in inspect.signature(kernel).parameters:
        return kernel

    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **kwargs, enable_gqa=True)

    return call


def register(kernel: Kernel, capability: tuple[int, int]) -> None:
    """Make ``attn_implementation="tunesmith_varlen"`` known to transformers, with this kernel for a GPU of this capability.

    Like ``attention.register``, it has no mask function.
    """
    AttentionInterface.register(NAME, attend_with(kernel, capability))


def attend_with(kernel: Kernel, capability: tuple[int, int]) -> Callable[..., tuple[torch.Tensor, None]]:
    """The attention function that transformers calls once a layer. It asks the device for nothing."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seqlens: torch.Tensor | None = None,
        longest: int = 0,
        cu_seqlens_k: torch.Tensor | None = None,
        longest_k: int = 0,
        key_places: torch.Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention inside each segment, causal or both ways; shapes are those of ``segment_attention``. Raises CannotPack."""
        attention.refuse(module, query, attention_mask, cu_seqlens is not None, dropout, kwargs)
        if not heads_fit(query.shape[-1], value.shape[-1], capability):
            raise CannotPack(
                f"its heads have {query.shape[-1]} numbers, which varlen_attn has no kernel for on this GPU"
            )
        causal = attention.is_causal(module, kwargs)
        if not causal and sliding_window is not None:
            raise CannotPack("its attention slides to both sides")
        attention.saw(sliding_window)
        if key_places is not None:
            attention.refuse_shared(causal, key.shape[2] - query.shape[2])
        layout = None
        if key.shape[2] != query.shape[2]:
            if not causal:
                raise CannotPack("virtual keys go with causal attention only")
            query, layout = attention.with_virtual(query, key, {"cu_seqlens": cu_seqlens, "longest": longest})
            cu_seqlens, longest = layout.keywords["cu_seqlens"], layout.keywords["longest"]
        # a window of w tokens is the token itself and w - 1 before it
        left = -1 if sliding_window is None else sliding_window - 1
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if key_places is None:
            cu_seqlens_k, longest_k = cu_seqlens, longest
        else:
            k, v = gathered(k, key_places), gathered(v, key_places)
        size = (left, 0 if causal else -1)
        out = kernel(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, scale=scaling, window_size=size)
        return (out if layout is None else layout.text(out, dim=0)).unsqueeze(0), None

    return attend


def gathered(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``x`` (tokens, heads, dim) at ``places``, by way of fp32: the gradients of what several answers see are summed there."""
    return x.float().index_select(0, places).to(x.dtype)


def self_test(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """How the kernel differs from plain attention on a small random input, or None: grouped heads, a window, and the gradients.

    The trial of ``train.fast_path`` sees at most 192 tokens of a row, which a window of thousands never cuts: this does.
    """
    generator = torch.Generator().manual_seed(0)
    lengths, dim = (37, 5, 90), 64
    tokens = sum(lengths)
    q, k, v, grad = (
        torch.randn(tokens, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2, 4)
    )
    cases = [
        (None, True, None),
        (16, True, None),
        (None, False, None),
        (None, True, (-1, 0, 0)),
        (64, True, (-1, 0, 0)),
    ]
    for window, causal, behind in cases:
        size = (-1 if window is None else window - 1, 0 if causal else -1)
        given = boundaries(lengths, device, behind)
        cuts, longest = given["cu_seqlens"], given["longest"]
        if behind is None:
            ours = kernel(q, k, v, cuts, cuts, longest, longest, scale=0.1, window_size=size)
        else:
            keys, values = (gathered(x, given["key_places"]) for x in (k, v))
            ours = kernel(
                q,
                keys,
                values,
                cuts,
                given["cu_seqlens_k"],
                longest,
                given["longest_k"],
                scale=0.1,
                window_size=size,
            )
        theirs = plain(q.float(), k.float(), v.float(), lengths, 0.1, window, causal, behind)
        pairs = [(ours.detach(), theirs.detach())]
        pairs += zip(
            *(torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)) for out in (ours, theirs)), strict=True
        )
        for got, expected in pairs:
            apart = float((got.float() - expected.float()).norm() / expected.float().norm())
            if not apart <= AGREEMENT:
                which = (
                    "with a sliding window"
                    if window
                    else "without a sliding window"
                    if causal
                    else "both ways"
                )
                return f"by {apart:.1e}, {which}{', behind a prefix' if behind else ''}"
    return None


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    causal: bool = True,
    behind: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The same attention, written out: softmax(scale q k^T + mask) v over (tokens, heads, dim)."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(owner), device=q.device)
    seen = owner[:, None] == owner[None, :]
    if behind is not None:
        ahead = torch.tensor(behind, device=q.device)[owner]
        seen |= ahead[:, None] == owner[None, :]
        begin = torch.cat([place.new_zeros(1), torch.tensor(lengths, device=q.device).cumsum(0)])
        sizes = torch.tensor(
            [0, *lengths], device=q.device
        )  # of the piece before each; the answers go on where it ended
        place = place - begin[owner] + torch.where(ahead < 0, 0, sizes[ahead + 1])
    distance = place[:, None] - place[None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)
