"""The rates of this machine that figures are compared with: of one large matrix product, and of reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tunesmith.models.load import huge_pages

SIZE = 2048
READ_BYTES = 1 << 29
"""Much more than a processor caches."""
REPEATS = 5


def matmul_flops(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of square matrices, on all threads of torch."""
    left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    return 2 * SIZE**3 / _best(lambda: left @ right)


def read_bandwidth() -> float:
    """Return the bytes per second at which all threads of torch read memory, on huge pages where the system has them."""
    block = huge_pages.allocate(READ_BYTES)
    numbers = (torch.empty(READ_BYTES, dtype=torch.uint8) if block is None else block).view(torch.float32).fill_(1.0)
    return READ_BYTES / _best(numbers.sum)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
