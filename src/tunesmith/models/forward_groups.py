"""Forward passes without gradients in groups that fit into the free memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tunesmith import machine
from tunesmith.data.batch import lane_groups
from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.shared_prompts import Sizes
from tunesmith.data.batch.step import batch_tokens, groups_of
from tunesmith.errors import OutOfMemoryError
from tunesmith.models import lanes

Result = TypeVar("Result")


def run_groups(
    run: Callable[[list[int]], Result],
    sizes: Sizes,
    budget: int,
    layout: Layout,
    device: torch.device,
    name: Callable[[int], str],
    groups: list[list[int]] | None = None,
) -> list[tuple[list[int], Result]]:
    """Return (indices, ``run(indices)``) of every micro-batch of at most ``budget`` tokens.

    ``groups``: the micro-batches to begin with. ``run`` is called in other threads where the layout has lanes. A micro-batch
    that does not fit into memory is halved, and later ones stay as small: without gradients more rows go together than in a
    training step, and they may be longer than any that was tried. Raises OutOfMemoryError with the ``name`` of an example
    that does not fit alone.
    """
    if groups is None:
        groups = groups_of(sizes, budget, layout)
    results: list[tuple[list[int], Result]] = []
    while groups:
        tokens = [batch_tokens(sizes, layout, group) for group in groups]
        found = lanes.run(_until_memory_runs_out(run, groups), tokens, budget, layout.lanes)
        results += [(group, result[0]) for group, result in zip(groups, found, strict=True) if result]
        failed = [number for number, result in enumerate(found) if not result]
        if not failed:
            break
        machine.release_memory(device)
        first = failed[0]
        group = groups[first]
        if first >= lane_groups.count_alone(tokens, budget, layout.lanes):
            budget = sum(tokens[first : first + layout.lanes]) // 2
        elif len(group) == 1:
            raise OutOfMemoryError(
                f"{name(group[0])}: this row alone ({tokens[first]} tokens) needs more memory than the machine has left.\n"
                "  Lower max_length (train.max_length, or --max-length), or take a smaller model."
            )
        else:
            budget = batch_tokens(sizes, layout, group[: (len(group) + 1) // 2])
        left = [place for number in failed for place in groups[number]]
        smaller = groups_of(sizes.of(left), budget, layout)
        groups = [[left[place] for place in places] for places in smaller]
    return results


def _until_memory_runs_out(
    run: Callable[[list[int]], Result], groups: list[list[int]]
) -> Callable[[int], tuple[Result] | None]:
    """Return a function from an index to the result of that group.

    It returns None from the first group on that does not fit: a raised error would keep tensors alive.
    """
    full = False

    def run_group(index: int) -> tuple[Result] | None:
        nonlocal full
        if full:
            return None
        try:
            return (run(groups[index]),)
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            full = True
            return None

    return run_group
