"""Weights on huge pages, for models that only compute.

A matrix product with few rows takes the time to read the weights from memory. On pages of 4 KB much of that time
is spent to find the pages, above all in a virtual machine: one core of an AMD EPYC (Zen 4) read 13 GB/s on these,
and 28 GB/s on pages of 2 MB. Linux gives huge pages only to memory that asks for them, and not to mapped files.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith import machine
from tunesmith.models.load.mapped_files import MappedFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE_BYTES = 2 << 20
ALIGNED_BYTES = 64
"""Each weight begins at a multiple of this, as in torch."""
MEMORY_SHARE = 0.5
"""Share of the free memory that the copy may take: a mapped file needs none, because its pages can be dropped."""


def move_weights(model: PreTrainedModel) -> bool:
    """Move the parameters of ``model``, which is on a CPU, to huge pages. Return False if they stay where they are.

    Names, shapes, strides and values stay. Each weight leaves its old place before the next is copied, so that the
    model is never in memory twice. Not for a model in training: other tensors may share its memory.
    """
    parameters = [
        parameter
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
    ]
    total = sum(_aligned(parameter.nbytes) for parameter in parameters)
    if total < PAGE_BYTES or total > MEMORY_SHARE * machine.free_bytes(torch.device("cpu")):
        return False
    block = allocate(total)
    if block is None:
        return False
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    files = MappedFiles()
    start = 0
    for parameter in parameters:
        address, size = parameter.data_ptr(), parameter.nbytes
        key = address, parameter.shape
        if key not in moved:
            part = block[start : start + size].view(parameter.dtype).view(parameter.shape)
            moved[key] = part.copy_(parameter.data)
            start += _aligned(size)
            files.drop(parameter.data)
        parameter.data = moved[key]
    return True


def _aligned(count: int) -> int:
    return -(-count // ALIGNED_BYTES) * ALIGNED_BYTES


def allocate(count: int) -> Tensor | None:
    """Return ``count`` bytes on huge pages; None where the system has none."""
    if sys.platform != "linux":
        return None
    try:
        memory = mmap.mmap(-1, count + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return None
    block = torch.frombuffer(memory, dtype=torch.uint8)
    first = -block.data_ptr() % PAGE_BYTES
    return block[first : first + count]
