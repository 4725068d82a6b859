"""The machine of a run: its processor, and the memory that this process holds and may still take.

Linux's /proc is read directly; psutil, which comes with accelerate, is used elsewhere.
"""

from __future__ import annotations

import functools
import gc
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from tunesmith.json_types import JsonObject

ISA_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve"),
)
"""Instruction sets that decide how fast low-precision matrix multiplication is."""
ABOVE_AVX2 = ("avx512", "amx")
"""Beginnings of the names of the instruction sets that ATEN_CPU_CAPABILITY=avx2 turns off."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tunesmith")


def describe() -> JsonObject:
    """Return what figures of a run depend on, as plain JSON values.

    Keys: ``cpu`` (model name), ``cores`` (this process may use), ``threads`` (of torch), ``isa`` (list, see
    ``instruction_sets``), ``class`` (see ``processor_class``), ``memory_bytes`` (of the machine, or its cgroup's
    limit), ``gpu`` (list of {name, memory_bytes}), ``os``, ``python``, ``versions`` ({package: version, null when
    it is not installed}).
    """
    cpu, _ = _cpu()
    return {
        "cpu": cpu,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": instruction_sets(),
        "class": processor_class(),
        "memory_bytes": _total_memory(),
        "gpu": _gpus(),
        "os": platform.platform(aliased=True, terse=False),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def instruction_sets() -> list[str]:
    """Return those of ISA_FLAGS that this process may use: those of the processor, unless it emulates AVX2."""
    found = [flag for flag in ISA_FLAGS if flag in _cpu()[1]]
    return [flag for flag in found if not flag.startswith(ABOVE_AVX2)] if emulates_avx2() else found


def emulates_avx2() -> bool:
    """Return whether torch was told to leave the newer half of this processor unused (ATEN_CPU_CAPABILITY=avx2).

    tunesmith's own kernels and its choice of a precision follow. oneDNN and MKL have variables of their own:
    ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2.
    """
    has_more = any(flag.startswith(ABOVE_AVX2) for flag in _cpu()[1])
    return has_more and torch.backends.cpu.get_cpu_capability() == "AVX2"


def processor_class() -> str:
    """Return the instruction set that decides how fast this process multiplies, such as "AVX512-BF16"."""
    sets = instruction_sets()
    ranks = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
    name = next((name for flag, name in ranks.items() if flag in sets), platform.machine())
    return f"{name} (emulated)" if emulates_avx2() else name


def memory_bytes() -> int:
    """Return the memory that this process holds now (resident set), in bytes."""
    if sys.platform == "linux":
        return _status_field(Path("/proc/self/status").read_text(), "VmRSS")
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Return the most memory that this process ever held (high-water mark of the resident set), in bytes."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        # some container sandboxes leave VmHWM out of their /proc; getrusage has it, in KiB
        return _status_field(status, "VmHWM") if "VmHWM:" in status else _max_rss() * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # getrusage(2): ru_maxrss is in bytes on macOS, in KiB on the other Unixes
    return _max_rss() * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Start the high-water mark of ``peak_memory_bytes`` anew, where the system can (Linux, proc(5)).

    Elsewhere a run after a larger one in the same process reports a peak of 0."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory_bytes() -> int:
    """Return the bytes that this process may still take, of machine or cgroup, swap included."""
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, used = _cgroup_bytes("max"), _cgroup_bytes("current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()


class PeakWatch:
    """Measures the most bytes held while a block runs: allocations of a CUDA device, or the resident set.

    A thread reads the resident set every few milliseconds: the kernel's own high-water mark covers the whole
    run, and cannot be reset everywhere.
    """

    def __init__(self, device: torch.device, every: float = 0.003) -> None:
        self.device, self.every = device, every
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> PeakWatch:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.device.type == "cuda":
            self.peak = int(torch.cuda.max_memory_allocated(self.device))
        else:
            self._done.set()
            self._thread.join()
            self.peak = max(self.peak, memory_bytes())

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, memory_bytes())
            self._done.wait(self.every)


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random state of the CPU and of ``device`` after the block."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def age() -> float:
    """Return the seconds since this process began, imports included."""
    return time.time() - float(psutil.Process().create_time())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a CUDA device or on a CPU."""
    words = str(error).lower()
    refused = "not enough memory" in words or "can't allocate memory" in words
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and refused
    )


def release_memory(device: torch.device) -> None:
    """Return freed memory to the system, so that the next attempt finds it in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _status_field(status: str, name: str) -> int:
    """Parse ``VmRSS:   1234 kB`` into bytes (proc(5): the unit is always kB)."""
    for line in status.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


def _max_rss() -> int:
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@functools.cache
def _cpu() -> tuple[str, set[str]]:
    """Return (model name, instruction set flags)."""
    if sys.platform == "linux":
        return _parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return name or platform.machine(), set()
    return platform.processor() or platform.machine(), set()


def _parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Parse /proc/cpuinfo: x86 has ``model name`` and ``flags``; arm64 has ``Features`` and often no name."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("hardware") or platform.machine()
    return name, set((fields.get("flags") or fields.get("features") or "").split())


def cores() -> int:
    """Return how many cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total_memory() -> int:
    total, limit = int(psutil.virtual_memory().total), _cgroup_bytes("max")
    return total if limit is None else min(total, limit)


def _cgroup_bytes(name: str) -> int | None:
    """Read a number of the process's cgroup; None where there is no cgroup or no limit."""
    file = Path(f"/sys/fs/cgroup/memory.{name}")
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None


def _gpus() -> list[dict[str, str | int | None]]:
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus]
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU (mps)", "memory_bytes": None}]
    return []


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
