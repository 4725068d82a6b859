"""Processes: the one file that uses accelerate. With a single process every function is the identity.

The rows of an optimiser step are distributed over the processes, each sums its own part of the gradient, and
the sums are added once per step. Nothing wraps the model and nothing averages averages, so two processes make
the update of one.

A collective raises ProcessLost after ``PATIENCE``, or at once where the other end is known to be gone.
``wait`` has no such limit: it waits for what the main process does alone (answers, files).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tunesmith.errors import ProcessLost, RecipeError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""The longest wait of a collective: the longest micro-batches of one process while another has none."""

LOST = ("gloo", "nccl", "connection", "timed out")
"""Words in the error of a collective when another process no longer answers."""

UNLIMITED = timedelta(days=30)

MEETING = "TUNESMITH_MEETING"
"""Environment variable: the file in which the processes of a launch find each other."""


def state() -> PartialState:
    """Return rank, number of processes and device, from the launcher's environment variables."""
    where: dict[str, str | int] = {}
    if (file := os.environ.get(MEETING)) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        where = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        where["init_method"] = Path(file).as_uri()
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE, **where)


@contextmanager
def collective(other_work: bool = False) -> Iterator[None]:
    """Wrap what all processes do at the same time; raise ProcessLost if one of them no longer does.

    ``other_work``: the block does other work too, so only an error with one of the words of ``LOST`` counts.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo and nccl raise nothing more precise
        here, message = state(), str(error)
        if here.num_processes == 1 or (other_work and not any(word in message.lower() for word in LOST)):
            raise
        raise ProcessLost(
            f"process {here.process_index} lost another of {here.num_processes}: it ended, or did not answer for "
            f"{PATIENCE.total_seconds() / 60:.0f} minutes. The last checkpoint is kept: continue with --resume.\n"
            f"  ({message.partition('. ')[0]})"
        ) from error


def wait() -> None:
    """Wait until every process is here, without a time limit."""
    if state().num_processes > 1:
        with collective():
            torch.distributed.barrier(_unlimited_group())


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block before the others, which then find the files that it wrote."""
    if not state().is_main_process:
        wait()
    yield
    if state().is_main_process:
        wait()


def add_gradients(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes, in place, in one message."""
    if state().num_processes == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with collective():
        torch.distributed.all_reduce(flat)
    for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def add(*numbers: float) -> tuple[float, ...]:
    """Sum each number over all processes. They travel between the hosts, so no device is waited for."""
    if state().num_processes == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    with collective():
        torch.distributed.all_reduce(total, group=_host_group())
    return tuple(total.tolist())


def add_tensor(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes; it stays on its device."""
    if state().num_processes == 1:
        return values
    total = values.clone()
    with collective():
        torch.distributed.all_reduce(total)
    return total


def gather(records: list[T]) -> list[T]:
    """Return all processes' records, in rank order."""
    if state().num_processes == 1:
        return records
    with collective():
        return list(gather_object(records))


def broadcast(value: T) -> T:
    """Return the main process's value in every process."""
    if state().num_processes == 1:
        return value
    with collective():
        values: list[T] = broadcast_object_list([value])
        return values[0]


def close() -> None:
    """Close the connections: their threads may abort a process that ends while they run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _unlimited_group.cache_clear()
        _host_group.cache_clear()
        torch.distributed.destroy_process_group()


@functools.cache
def _unlimited_group() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=UNLIMITED)
    return group


@functools.cache
def _host_group() -> torch.distributed.ProcessGroup | None:
    """Return a group of the processes' hosts; None = the default group, which is one already on CPUs."""
    group: torch.distributed.ProcessGroup | None = None
    if state().device.type != "cpu":
        group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return group


def check_processes(processes: int, rows: int, what: str) -> None:
    """Raise RecipeError if a process would never get a row. ``what``: such as "train.batch_size is"."""
    if processes > rows:
        raise RecipeError(
            f"{processes} processes share the rows of a step, and {what} {rows}: {processes - rows} would never get one.\n"
            f"  Start at most {rows} processes, or give each step more rows."
        )
