"""Forward passes without gradients in groups that fit into the free memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tunesmith import machine
from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.shared_prompts import Sizes
from tunesmith.data.batch.step import batch_tokens, groups_of
from tunesmith.errors import OutOfMemoryError

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

    ``groups``: the micro-batches to
    begin with. A micro-batch that does not fit
    into memory is halved, and later ones stay as small: without gradients more rows go together than in a
    training step, and they may be longer than any that was tried. Raises OutOfMemoryError with the ``name``
    of an example that does not fit alone.
    """
    if groups is None:
        groups = groups_of(sizes, budget, layout)
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
            size = batch_tokens(sizes, layout, group)
            raise OutOfMemoryError(
                f"{name(group[0])}: this row alone ({size} tokens) needs more memory than the machine has left.\n"
                "  Lower max_length (train.max_length, or --max-length), or take a smaller model."
            )
        half = group[: (len(group) + 1) // 2]
        budget = batch_tokens(sizes, layout, half)
        left = [place for part in groups for place in part]
        smaller = groups_of(sizes.of(left), budget, layout)
        groups = [[left[place] for place in places] for places in smaller]
    return results


def _try(run: Callable[[list[int]], Result], group: list[int]) -> tuple[Result] | None:
    """Return the result, or None if memory runs out; a raised error would keep tensors alive."""
    try:
        return (run(group),)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return None
