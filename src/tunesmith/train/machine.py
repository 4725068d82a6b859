"""The machine a run is on: what it is, how much memory this process holds, how much disk is left.

Only Linux's /proc is read directly; elsewhere psutil answers, which comes with accelerate.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Instruction sets that decide how fast low-precision matrix multiplication is.
ISA_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve"),
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tunesmith")


def describe() -> dict[str, Any]:
    """What figures of a run depend on, as plain JSON values.

    Keys: ``cpu`` (model name), ``cores`` (this process may use), ``threads`` (torch computes with), ``isa`` (list, see
    ISA_FLAGS), ``memory_bytes`` (of the machine, or its cgroup's limit), ``gpu`` (list of {name, memory_bytes}), ``os``,
    ``python``, ``versions`` ({package: version, null when it is not installed}).
    """
    import torch

    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "memory_bytes": _total_memory(),
        "gpu": _gpus(torch),
        "os": platform.platform(aliased=True, terse=False),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def memory_bytes() -> int:
    """Memory this process holds now (resident set), in bytes."""
    if sys.platform == "linux":
        return _status_field(Path("/proc/self/status").read_text(), "VmRSS")
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most memory this process ever held (high-water mark of the resident set), in bytes."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        # Some container sandboxes leave VmHWM out of their /proc; getrusage then knows it, in KiB.
        return _status_field(status, "VmHWM") if "VmHWM:" in status else _max_rss() * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # getrusage(2): ru_maxrss is in bytes on macOS, in KiB on the other Unixes.
    return _max_rss() * (1 if sys.platform == "darwin" else 1024)


def available_memory_bytes() -> int:
    """Memory that this process may still take: the machine's (or its cgroup's) available bytes and free swap."""
    import psutil

    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


class PeakWatch:
    """The most memory held while a block runs, in bytes: of a CUDA device its allocations, else the resident set of the process.

    The resident set is looked at every few milliseconds by a thread; the kernel's own high-water mark cannot be set back
    everywhere, and is a figure of the whole run.
    """

    def __init__(self, device: Any, every: float = 0.003) -> None:
        self.device, self.every = device, every
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> PeakWatch:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.peak = int(torch.cuda.max_memory_allocated(self.device))
        else:
            self._done.set()
            self._thread.join()
            self.peak = max(self.peak, memory_bytes())

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, memory_bytes())
            self._done.wait(self.every)


def synchronize(device: Any) -> None:
    """Wait until ``device`` has done all that it was given, for a clock to be read."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def age() -> float:
    """Seconds since this process began: a program spends some of them on imports."""
    import psutil

    return time.time() - psutil.Process().create_time()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CUDA device, or on a CPU whose system refuses (most grant anything, and kill later)."""
    import torch

    words = str(error).lower()
    refused = "not enough memory" in words or "can't allocate memory" in words
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and refused
    )


def release_memory(device: Any) -> None:
    """Give freed memory back, so that the next attempt finds it in one piece."""
    import gc

    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _status_field(status: str, name: str) -> int:
    """``VmRSS:   1234 kB`` -> bytes (proc(5): the unit is always kB)."""
    for line in status.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


def _max_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cpu() -> tuple[str, set[str]]:
    """(model name, instruction set flags)."""
    if sys.platform == "linux":
        return _parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.machine(), set()
    return platform.processor() or platform.machine(), set()


def _parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """x86 has ``model name`` and ``flags``; arm64 has ``Features`` and often no name at all."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("hardware") or platform.machine()
    return name, set((fields.get("flags") or fields.get("features") or "").split())


def cores() -> int:
    """How many cores this process may run on, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total_memory() -> int:
    if sys.platform != "linux":
        import psutil

        return int(psutil.virtual_memory().total)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [{"name": one.name, "memory_bytes": one.total_memory} for one in properties]
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU (mps)", "memory_bytes": None}]
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
