"""The C passes of ``kernels.c`` for CPUs, compiled once with the machine's C compiler and cached on disk.

Each has a counterpart in torch. Where there is no compiler, the self-test disagrees with torch, or tensors
are on another device, ``available`` returns False and the callers use torch.
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

import torch
from torch import Tensor

from tunesmith import files, machine
from tunesmith.errors import DiskError

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = ("attention", "encoder", "products", "decode", "prefill", "sampling")
INCLUDED = [SOURCE.with_name(f"kernels_{name}.c") for name in PARTS]
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
CHUNK = 1 << 22
"""Elements rounded at a time where there is no C: the hash needs 8 bytes for each."""
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def cache_folder() -> Path:
    return files.home() / "kernels"


def _compile() -> Path | None:
    """Return the shared library for this source, compiler and processor; None where it cannot be built."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or platform.system() != "Linux":
        return None
    # the output of -march=native depends on the processor, so its description is part of the key
    info = Path("/proc/cpuinfo")
    processor = info.read_text().partition("\n\n")[0] if info.exists() else platform.processor()
    described = ("flags", "model name", "Features")
    processor = "\n".join(line for line in processor.splitlines() if line.startswith(described))
    wide = platform.machine() == "x86_64" and "clang" not in compiler
    target_flags = ["-march=haswell"] if machine.emulates_avx2() else ["-march=native"]
    if wide:
        target_flags.append("-mprefer-vector-width=512")
    flags = [*target_flags, *FLAGS]
    command = " ".join([compiler, *flags])
    sources = [path.read_bytes() for path in (SOURCE, *INCLUDED)]
    parts = [*sources, command.encode(), processor.encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache_folder() / f"kernels-{key}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.publish_file(target) as built:  # two processes may build at once
            command_line = [compiler, *flags, "-o", str(built), str(SOURCE), "-lm"]
            subprocess.run(command_line, check=True, capture_output=True, timeout=120)
    except (OSError, DiskError, subprocess.SubprocessError):
        return None
    return target


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None. It uses torch's OpenMP runtime (libgomp.so.1), already loaded."""
    path = None if os.environ.get("TUNESMITH_KERNELS") == "0" else _compile()
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None
    return loaded if _agrees_with_torch(loaded) else None


def available(tensor: Tensor) -> bool:
    """Return whether the C passes can serve this tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in SUFFIX and library() is not None


def vector_floats() -> int:
    """Return how many floats a vector of the compiled passes holds."""
    return _run("vector_floats")


def call(name: str, dtype: torch.dtype | None, *arguments: Tensor | float) -> None:
    """Call the C function ``name`` for ``dtype`` (None: it has one form). Nothing checks the tensors' layout."""
    _run(_function(name, dtype), *arguments)


def call_in_memory(name: str, dtype: torch.dtype | None, *arguments: Tensor | float) -> None:
    """:func:`call` of a function that takes memory of its own. Raises MemoryError if it gets none."""
    function = _function(name, dtype)
    if _run(function, *arguments) != 0:
        raise MemoryError(f"{function}: not enough memory")


def _function(name: str, dtype: torch.dtype | None) -> str:
    return name if dtype is None else f"{name}_{SUFFIX[dtype]}"


def _run(function: str, *arguments: Tensor | float) -> int:
    loaded = library()
    assert loaded is not None, "callers ask available() first"
    return _call(loaded, function, *arguments)


def _call(lib: ctypes.CDLL, name: str, *arguments: Tensor | float) -> int:
    """Pass tensors as pointers, ints as int64 and floats as float."""
    return int(lib[name](*[_to_c(argument) for argument in arguments]))


def _to_c(argument: Tensor | float) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int64:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _agrees_with_torch(lib: ctypes.CDLL) -> bool:
    """Return whether ``lib`` computes its formulas on a small input: a miscompiled library is never used."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 8, 64, generator=generator).unbind(0)
    wide, label = torch.randn(8, 128, generator=generator), torch.arange(8)
    logits, losses = x.clone(), torch.empty(8)
    _call(lib, "cross_entropy_f32", logits, label, losses, 8, 64)
    gradient = torch.softmax(x, -1) - torch.nn.functional.one_hot(label, 64)
    scores = x.reshape(8, 8, 8).clone()
    _call(lib, "causal_softmax_f32", scores, 0.5, 8, 8, 8)
    masked = (x.reshape(8, 8, 8) * 0.5).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    product = torch.empty(8, 64)
    _call(lib, "swiglu_f32", wide, wide[:, 64:], product, 8, 64, 128)
    normed, inverse = torch.empty(8, 64), torch.empty(8)
    _call(lib, "rms_norm_f32", x, other[0].contiguous(), normed, inverse, 1e-5, 8, 64)
    pairs = [
        (losses, torch.nn.functional.cross_entropy(x, label, reduction="none")),
        (logits, gradient),
        (scores, torch.softmax(masked, -1)),
        (product, torch.nn.functional.silu(wide[:, :64]) * wide[:, 64:]),
        (normed, torch.nn.functional.rms_norm(x, (64,), other[0], 1e-5)),
    ]
    return all(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) for ours, theirs in pairs)


def mix_bits(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, for 32-bit numbers in int64. kernels.c has the same, bit for bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h


def stochastic_round(x: Tensor, out: Tensor, seed: int) -> None:
    """Round fp32 ``x`` to bf16 or fp16 ``out``, up or down at random so that the mean over seeds is ``x``
    (Gupta et al. 2015).

    Rounding to nearest loses an update below half a unit in the last place every time; this keeps it in
    expectation. The draws depend on ``seed`` and the index in the tensor alone.
    """
    seed &= 0xFFFFFFFF
    if available(out) and x.is_contiguous() and out.is_contiguous():
        return call("stochastic_round", None, x, out, x.numel(), seed)
    rounded = torch.empty(x.numel(), dtype=out.dtype, device=x.device)
    to_neighbour = _to_bf16 if out.dtype is torch.bfloat16 else _to_fp16
    for start in range(0, x.numel(), CHUNK):
        bits = x.reshape(-1)[start : start + CHUNK].view(torch.int32).long() & 0xFFFFFFFF
        index = torch.arange(start, start + len(bits), device=x.device)
        h = mix_bits((index * 0x9E3779B1 + seed) & 0xFFFFFFFF)
        rounded[start : start + CHUNK] = to_neighbour(bits, h)
    out.copy_(rounded.view(out.shape))


def _to_bf16(bits: Tensor, h: Tensor) -> Tensor:
    """Round fp32 ``bits`` (int64) by random bits ``h``. bf16 is the upper half of fp32: a carry rounds up."""
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = ((bits + torch.where(finite, h & 0xFFFF, 0)) >> 16) & 0xFFFF
    return torch.where(upper > 0x7FFF, upper - 0x10000, upper).to(torch.int16).view(torch.bfloat16)


def _to_fp16(bits: Tensor, h: Tensor) -> Tensor:
    """Round fp32 ``bits`` (int64) by random bits ``h``. fp16 has a shorter exponent than fp32.

    Below 2^-14 fp16 numbers are 2^-24 apart, so the number of lost bits varies: the distance of two
    neighbours is computed first, all else is exact.
    """
    exponent = ((bits >> 23) & 0xFF) - 127
    spacing = ((exponent.clamp_min(-14) - 10 + 127) << 23).to(torch.int32).view(torch.float32)
    value = torch.where(bits > 0x7FFFFFFF, bits - 0x100000000, bits).to(torch.int32).view(torch.float32)
    steps = value.abs() / spacing
    below = steps.floor()
    carry = (((steps - below) * 2.0**24).to(torch.int64) + (h >> 8)) >> 24
    magnitude = ((below + carry) * spacing).clamp_max(65504.0)
    # beyond the fp16 numbers (65520 and more, nan) torch's cast applies: infinity, nan
    return torch.where(value.abs() < 65520.0, magnitude.copysign(value), value).to(torch.float16)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning each to the kernel.

    A training step frees and takes the same megabyte-sized blocks thousands of times. By default the kernel
    maps, zeroes and unmaps each anew, which costs more than the arithmetic on it (attention at 200 tokens:
    2.7 ms against 0.8 ms).
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # M_MMAP_THRESHOLD and so on in malloc.h
        libc.mallopt(arena_max, 1)  # the threads of models.lanes take what others freed
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 30)


def return_freed_memory() -> None:
    """Return memory that glibc keeps since :func:`keep_freed_memory`: rows of many lengths leave holes."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
