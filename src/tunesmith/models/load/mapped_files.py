"""Weights that lie in mapped files: safetensors maps a checkpoint instead of reading it.

The pages of a mapped file count as memory of the process once they are read, until the file is closed. A weight
that has been copied elsewhere needs its pages no more, so they are dropped before the next weight is copied: a
model is never in memory twice. The system keeps the file in its own cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The files that this process has mapped now. Elsewhere than on Linux there are none to see."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        """Addresses, [first, end)."""
        if sys.platform == "linux":
            for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
                addresses, _, _, _, inode, *_ = line.split()
                if inode != "0":
                    first, end = (int(address, 16) for address in addresses.split("-"))
                    self._ranges.append((first, end))

    def drop(self, copied: Tensor) -> None:
        """Remove the whole pages of ``copied`` from memory if it lies in a mapped file.

        The tensor stays valid: its pages are read again from the file if anyone needs them. It must not have
        been written to."""
        first, end = copied.data_ptr(), copied.data_ptr() + copied.nbytes
        if copied.device.type != "cpu" or not copied.is_contiguous():
            return
        if not any(start <= first and end <= stop for start, stop in self._ranges):
            return
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            length = ctypes.c_size_t(end - first)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_DONTNEED)
