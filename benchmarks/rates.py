"""The rates of this machine that figures are compared with: of one large matrix product, and of reading memory.

``measure`` and ``share`` tell how much of the product's rate a training run reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith import machine
from tunesmith.models.load import huge_pages

SIZE = 2048
READ_BYTES = 1 << 29
"""Much more than a processor caches."""
REPEATS = 5


def matmul_flops(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of square matrices, on all threads of torch."""
    left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    return 2 * SIZE**3 / _best(lambda: left @ right)


def measure(precision: str) -> dict[str, Any]:
    """Return the class of this processor and the rate of a large product in ``precision`` (bf16 or fp32), for the results."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {"class": machine.processor_class(), "precision": precision, "matmul_flops": matmul_flops(dtype)}


def describe(measured: dict[str, Any]) -> str:
    """Return the line to print about :func:`measure`."""
    rate = f"{measured['matmul_flops'] / 1e9:,.0f} GFLOP/s"
    return f"processor class {measured['class']}: {rate} in one large {measured['precision']} product"


def training_flops(folder: Path, tokens: int, targets: int, full: bool, reference: bool = False) -> float:
    """Return the operations of the products with the weights of the model in ``folder`` that a training run needs.

    A weight takes two operations for each token in the forward pass, two in the gradient of its input and, with ``full``, two in
    its own gradient. Of the vocabulary's weights only ``targets`` count. ``reference``: one more forward pass. The products of
    attention, which have no weights, are not counted, and neither are LoRA's, which are a hundredth.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        body = AutoModel.from_config(config)
    layers = [layer for name, layer in body.named_modules() if isinstance(layer, torch.nn.Linear) and "pooler" not in name]
    weights = sum(layer.weight.numel() for layer in layers)
    passes = (3 if full else 2) + reference
    return 2.0 * passes * (weights * tokens + config.vocab_size * config.hidden_size * targets)


def share(measured: dict[str, Any], flops: float, seconds: float) -> float:
    """Return the share of the measured rate that ``flops`` in ``seconds`` reach."""
    return flops / seconds / float(measured["matmul_flops"])


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
