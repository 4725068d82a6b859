"""Forward passes without gradients of the examples of a step, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Step
from tunesmith.models.forward_groups import run_groups
from tunesmith.train import distributed

Result = TypeVar("Result")


def share_by_length(step: Step) -> list[int]:
    """Return the places of this process, the longest example first."""
    order = np.argsort(-step.lengths, kind="stable")
    state = distributed.state()
    return [int(place) for place in order[state.process_index :: state.num_processes]]


def run_step(
    run: Callable[[Sequence[int]], Result],
    step: Step,
    budget: int,
    layout: Layout,
    device: torch.device,
    purpose: str,
) -> list[tuple[list[int], Result]]:
    """:func:`run_groups` of this process's examples of ``step``, the longest first: (places, result) of each.

    ``purpose`` appears in the error, such as ``evaluation``.
    """
    mine = share_by_length(step)
    sizes = step.data.sizes(step.rows[mine], layout)
    results = run_groups(
        lambda group: run([mine[index] for index in group]), sizes, budget, layout, device,
        lambda index: f"{purpose} of {step.name(mine[index])}",
    )  # fmt: skip
    return [([mine[index] for index in group], result) for group, result in results]


def run_micro_batches(
    run: Callable[[Sequence[int]], Result],
    step: Step,
    budget: int,
    layout: Layout,
    device: torch.device,
    purpose: str,
) -> list[tuple[list[int], Result]]:
    """:func:`run_step` in the micro-batches that training makes of ``step``, so that in every number format
    a forward pass of training computes the same values."""
    state = distributed.state()
    groups = step.split(budget, layout, state.process_index, state.num_processes)
    return run_groups(
        run, step.data.sizes(step.rows, layout), budget, layout, device,
        lambda index: f"{purpose} of {step.name(index)}", groups,
    )  # fmt: skip
