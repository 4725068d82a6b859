"""Processes: the one file that touches accelerate. Alone, every function is the identity.

Rows of an optimiser step are shared out over the processes, each sums its own part of the gradient, and the sums are added once
per step. There is no wrapper around the model, no hook and no average of averages, so two processes make the update of one.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


def state() -> PartialState:
    """Rank, number of processes and device, from the launcher's environment variables."""
    return PartialState(cpu=not torch.cuda.is_available())


def add_gradients(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes, in place, as one message."""
    if state().num_processes == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def add(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes."""
    if state().num_processes == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=state().device)
    torch.distributed.all_reduce(total)
    return tuple(total.tolist())


def gather(records: list[Any]) -> list[Any]:
    """All processes' records, in rank order."""
    return records if state().num_processes == 1 else list(gather_object(records))


def same(value: Any) -> Any:
    """The main process's value, everywhere."""
    return value if state().num_processes == 1 else broadcast_object_list([value])[0]
