"""Processes: the one file that touches accelerate. Alone, every function is the identity.

Rows of an optimiser step are shared out over the processes, each sums its own part of the gradient, and the sums are added once
per step. There is no wrapper around the model, no hook and no average of averages, so two processes make the update of one.

A collective waits for ``PATIENCE`` at most, and fails at once where the other end is known to be gone: ProcessLost. What the main
process does alone (answers, files) is waited for with ``wait``, which has no such limit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tunesmith.errors import ProcessLost, RecipeError

PATIENCE = timedelta(minutes=10)
"""How long a collective waits: the longest micro-batches of one process while another has none."""

LOST = ("gloo", "nccl", "connection", "timed out")
"""Words of an error that means that another process no longer answers."""

_AS_LONG_AS_IT_TAKES = timedelta(days=30)


MEETING = "TUNESMITH_MEETING"
"""Environment variable: the file in which the processes of a launch find each other; without it, as torchrun says."""


def state() -> PartialState:
    """Rank, number of processes and device, from the launcher's environment variables."""
    where = {}
    if (file := os.environ.get(MEETING)) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        where = {"init_method": Path(file).as_uri(), **processes}
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE, **where)


@contextmanager
def together(and_more: bool = False) -> Iterator[None]:
    """Around whatever all processes must do at the same time. Raises ProcessLost where one of them no longer does.

    ``and_more``: other work is done inside too, so an error is only taken for that when its words speak of a connection.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo and nccl raise nothing more precise
        if state().num_processes == 1 or (and_more and not any(word in str(error).lower() for word in LOST)):
            raise
        said, minutes = str(error).partition(". ")[0], PATIENCE.total_seconds() / 60
        raise ProcessLost(
            f"process {state().process_index} lost another of {state().num_processes}: it ended, or did not answer for "
            f"{minutes:.0f} minutes. The last checkpoint is kept: go on with --resume.\n  ({said})"
        ) from error


def wait() -> None:
    """Until every process is here, however long one of them takes over what it does alone."""
    if state().num_processes > 1:
        with together():
            torch.distributed.barrier(_patient_group())


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is inside before the others do: they find the files that it wrote."""
    if not state().is_main_process:
        wait()
    yield
    if state().is_main_process:
        wait()


def add_gradients(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes, in place, as one message."""
    if state().num_processes == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with together():
        torch.distributed.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def add(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes. They travel between the hosts, so no device is waited for."""
    if state().num_processes == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    with together():
        torch.distributed.all_reduce(total, group=_host_group())
    return tuple(total.tolist())


def add_tensor(values: torch.Tensor) -> torch.Tensor:
    """The tensor summed over all processes; it stays on its device."""
    if state().num_processes == 1:
        return values
    total = values.clone()
    with together():
        torch.distributed.all_reduce(total)
    return total


def gather(records: list[Any]) -> list[Any]:
    """All processes' records, in rank order."""
    if state().num_processes == 1:
        return records
    with together():
        return list(gather_object(records))


def same(value: Any) -> Any:
    """The main process's value, everywhere."""
    if state().num_processes == 1:
        return value
    with together():
        return broadcast_object_list([value])[0]


def end() -> None:
    """Close the connections. A process that ends while their threads still run may be aborted by them, all its work done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _patient_group.cache_clear()
        _host_group.cache_clear()
        torch.distributed.destroy_process_group()


@functools.cache
def _patient_group() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=_AS_LONG_AS_IT_TAKES)


@functools.cache
def _host_group() -> Any:
    """Of the processes' hosts; None = the default group, where that is theirs."""
    return (
        None
        if state().device.type == "cpu"
        else torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    )


def check_processes(processes: int, rows: int, what: str) -> None:
    """The rows of a step are shared out over the processes; one that never has a row would only cost. Raises RecipeError."""
    if processes > rows:
        raise RecipeError(
            f"{processes} processes share the rows of a step, and {what} {rows}: {processes - rows} would never have one.\n"
            f"  Start at most {rows} processes, or give each step more rows."
        )
