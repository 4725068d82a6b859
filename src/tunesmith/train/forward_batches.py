"""Forward passes without gradients (reference, evaluation, predictions) that adapt to the free memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from tunesmith import machine
from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Step, batch_tokens, groups_under
from tunesmith.errors import OutOfMemoryError
from tunesmith.train import distributed

Result = TypeVar("Result")


def share_by_length(step: Step) -> list[int]:
    """Return the places of this process, the longest example first."""
    order = np.argsort(-step.lengths, kind="stable")
    state = distributed.state()
    return [int(place) for place in order[state.process_index :: state.num_processes]]


def run_groups(
    run: Callable[[list[int]], Result],
    sizes: tuple[np.ndarray, np.ndarray],
    budget: int,
    layout: Layout,
    device: torch.device,
    name: Callable[[int], str],
    groups: list[list[int]] | None = None,
) -> list[tuple[list[int], Result]]:
    """Return (indices, ``run(indices)``) of every micro-batch of at most ``budget`` tokens.

    ``sizes``: tokens and rows of each example, see ``shared_prompts.sizes``. ``groups``: the micro-batches to
    begin with. A micro-batch that does not fit
    into memory is halved, and later ones stay as small: without gradients more rows go together than in a
    training step, and they may be longer than any that was tried. Raises OutOfMemoryError with the ``name``
    of an example that does not fit alone.
    """
    lengths, rows = sizes
    if groups is None:
        groups = groups_under(lengths.tolist(), budget, layout, rows.tolist())
    results: list[tuple[list[int], Result]] = []
    while groups:
        group, *others = groups
        result = _try(run, group)
        if result is not None:
            results.append((group, result[0]))
            groups = others
            continue
        machine.release_memory(device)
        if len(group) == 1:
            size = batch_tokens(lengths[group], rows[group], layout)
            raise OutOfMemoryError(
                f"{name(group[0])}: this row alone ({size} tokens) needs more memory than the machine has left.\n"
                "  Lower max_length (train.max_length, or --max-length), or take a smaller model."
            )
        half = group[: (len(group) + 1) // 2]
        budget = batch_tokens(lengths[half], rows[half], layout)
        left = [place for part in groups for place in part]
        smaller = groups_under(lengths[left].tolist(), budget, layout, rows[left].tolist())
        groups = [[left[place] for place in places] for places in smaller]
    return results


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


def _try(run: Callable[[list[int]], Result], group: list[int]) -> tuple[Result] | None:
    """Return the result, or None if memory runs out; a raised error would keep tensors alive."""
    try:
        return (run(group),)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return None
