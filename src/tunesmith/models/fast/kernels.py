"""The fused element-wise passes of ``kernels.c`` for CPUs, compiled once with the machine's C compiler and kept in a cache.

Everything here has a plain twin in torch and nothing depends on it: where there is no compiler, where the self-test disagrees
with torch, or where tensors are on another device, ``available`` says no and the callers take the plain path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from tunesmith import files
from tunesmith.errors import DiskFullError

SOURCE = Path(__file__).with_name("kernels.c")
PART = Path(__file__).with_name("kernels_encoder.c")
"""Included by the other."""
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
CHUNK = 1 << 22  # elements rounded at a time where there is no C: the hash needs 8 bytes for each
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def cache_folder() -> Path:
    return files.home() / "kernels"


def _compile() -> Path | None:
    """The shared library for this source, compiler and processor; None where it cannot be built."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or platform.system() != "Linux":
        return None
    # -march=native output depends on the processor, so its description is part of the key
    processor = (
        Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    processor = "\n".join(
        line for line in processor.splitlines() if line.startswith(("flags", "model name", "Features"))
    )
    key = hashlib.sha256(
        b"\0".join(
            [
                SOURCE.read_bytes(),
                PART.read_bytes(),
                " ".join([compiler, *FLAGS]).encode(),
                processor.encode(),
            ]
        )
    ).hexdigest()[:16]
    target = cache_folder() / f"kernels-{key}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.publish_file(target) as built:  # two processes may build at once
            flags = (
                FLAGS
                if "clang" in compiler
                else [*FLAGS, "-mprefer-vector-width=512"]
                if platform.machine() == "x86_64"
                else FLAGS
            )
            subprocess.run(
                [compiler, *flags, "-o", str(built), str(SOURCE), "-lm"],
                check=True,
                capture_output=True,
                timeout=120,
            )
    except (OSError, DiskFullError, subprocess.SubprocessError):
        return None
    return target


@functools.cache
def library() -> Any | None:
    """The loaded library, or None. torch's own OpenMP runtime (libgomp.so.1) is already loaded and serves it."""
    path = None if os.environ.get("TUNESMITH_KERNELS") == "0" else _compile()
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None
    return loaded if _agrees_with_torch(loaded) else None


def available(tensor: torch.Tensor) -> bool:
    """Whether the fused passes can serve this tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in SUFFIX and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float, lib: Any = None) -> None:
    """Call one C function: tensors go as pointers, ints as int64, floats as float. Tensors must have the layout it expects."""
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    getattr(lib or library(), f"{name}_{SUFFIX[dtype]}")(*converted)


def _agrees_with_torch(lib: Any) -> bool:
    """Each function on a small input against its formula, so that a miscompiled library is never used."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 8, 64, generator=generator).unbind(0)
    wide, label = torch.randn(8, 128, generator=generator), torch.arange(8)
    logits, losses = x.clone(), torch.empty(8)
    call("cross_entropy", torch.float32, logits, label, losses, 8, 64, lib=lib)
    gradient = torch.softmax(x, -1) - torch.nn.functional.one_hot(label, 64)
    scores = x.reshape(8, 8, 8).clone()
    call("causal_softmax", torch.float32, scores, 0.5, 8, 8, 8, lib=lib)
    masked = (x.reshape(8, 8, 8) * 0.5).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    product = torch.empty(8, 64)
    call("swiglu", torch.float32, wide, wide[:, 64:], product, 8, 64, 128, lib=lib)
    normed, inverse = torch.empty(8, 64), torch.empty(8)
    call("rms_norm", torch.float32, x, other[0].contiguous(), normed, inverse, 1e-5, 8, 64, lib=lib)
    pairs = [
        (losses, torch.nn.functional.cross_entropy(x, label, reduction="none")),
        (logits, gradient),
        (scores, torch.softmax(masked, -1)),
        (product, torch.nn.functional.silu(wide[:, :64]) * wide[:, 64:]),
        (normed, torch.nn.functional.rms_norm(x, (64,), other[0], 1e-5)),
    ]
    return all(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) for ours, theirs in pairs)


def stochastic_round(x: torch.Tensor, out: torch.Tensor, seed: int) -> None:
    """Round fp32 ``x`` to bf16 or fp16 ``out``, up or down at random so that the mean over seeds is ``x`` (Gupta et al. 2015).

    Rounding to nearest loses an update below half a unit in the last place every time; this keeps it in expectation. What is
    drawn depends on ``seed`` and the place in the tensor alone.
    """
    seed &= 0xFFFFFFFF
    if available(out) and x.is_contiguous() and out.is_contiguous():
        loaded = library()
        assert loaded is not None  # available() said so
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        loaded.stochastic_round(*pointers, ctypes.c_int64(x.numel()), ctypes.c_int64(seed))
        return
    rounded = torch.empty(x.numel(), dtype=out.dtype, device=x.device)
    to_nearby = _to_bf16 if out.dtype is torch.bfloat16 else _to_fp16
    for start in range(0, x.numel(), CHUNK):
        bits = x.reshape(-1)[start : start + CHUNK].view(torch.int32).long() & 0xFFFFFFFF
        h = (torch.arange(start, start + len(bits), device=x.device) * 0x9E3779B1 + seed) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        rounded[start : start + CHUNK] = to_nearby(bits, h)
    out.copy_(rounded.view(out.shape))


def _to_bf16(bits: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """fp32 ``bits`` with random ``h`` (int64, 32 bits used): bf16 is the upper half of fp32, so a carry from below rounds up."""
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = ((bits + torch.where(finite, h & 0xFFFF, 0)) >> 16) & 0xFFFF
    return torch.where(upper > 0x7FFF, upper - 0x10000, upper).to(torch.int16).view(torch.bfloat16)


def _to_fp16(bits: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The same for fp16, which is no part of fp32's bits: its exponent is shorter, and below 2^-14 its numbers lie 2^-24 apart,
    so how many bits fall away depends on the number. Hence the distance of two neighbours is found first; all else is exact.
    """
    exponent = ((bits >> 23) & 0xFF) - 127
    spacing = ((exponent.clamp_min(-14) - 10 + 127) << 23).to(torch.int32).view(torch.float32)
    value = torch.where(bits > 0x7FFFFFFF, bits - 0x100000000, bits).to(torch.int32).view(torch.float32)
    steps = value.abs() / spacing
    below = steps.floor()
    carry = (((steps - below) * 2.0**24).to(torch.int64) + (h >> 8)) >> 24
    magnitude = ((below + carry) * spacing).clamp_max(65504.0)
    # what no fp16 number is near (65520 and more, nan) goes as torch casts it: to infinity, nan
    return torch.where(value.abs() < 65520.0, magnitude.copysign(value), value).to(torch.float16)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning each to the kernel.

    A training step frees and takes the same megabyte-sized blocks thousands of times; by default each is mapped, zeroed page by
    page and unmapped anew, which costs more than the arithmetic on it (attention at 200 tokens: 2.7 ms against 0.8 ms).
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 30)


def return_freed_memory() -> None:
    """Give back what :func:`keep_freed_memory` has kept: rows of ever new lengths leave holes that add up over a long run."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
