"""Examples that only go through the network (a reference, evaluation, predictions), as many at a time as fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Step, batch_tokens, groups_under
from tunesmith.errors import OutOfMemoryError
from tunesmith.train import distributed, machine

Result = TypeVar("Result")


def share_by_length(step: Step) -> list[int]:
    """Places of this process, the longest example first."""
    order = np.argsort(-step.lengths, kind="stable")
    state = distributed.state()
    return [int(place) for place in order[state.process_index :: state.num_processes]]


def in_groups(
    run: Callable[[list[int]], Result],
    sizes: tuple[np.ndarray, np.ndarray],
    budget: int,
    layout: Layout,
    device: Any,
    name: Callable[[int], str],
) -> list[tuple[list[int], Result]]:
    """(indices, ``run(indices)``) of every micro-batch. ``sizes``: tokens and rows of each example, see ``shared_prompts.sizes``.

    A micro-batch that does not fit is halved, and all later ones are kept as small: without gradients more rows go together than
    in a step, and they may be longer than any that was tried. Raises OutOfMemoryError, which begins with the ``name`` of an
    example, when one alone does not fit.
    """
    lengths, several = sizes
    groups = groups_under(lengths.tolist(), budget, layout, several.tolist())
    found: list[tuple[list[int], Result]] = []
    while groups:
        group, *others = groups
        fits, result = _tried(run, group)
        if fits:
            found.append((group, result))
            groups = others
            continue
        machine.release_memory(device)
        if len(group) == 1:
            size = batch_tokens(lengths[group], several[group], layout)
            raise OutOfMemoryError(
                f"{name(group[0])}: this row alone ({size} tokens) needs more memory than the machine has left.\n"
                "  Lower max_length (train.max_length, or --max-length), or take a smaller model."
            )
        half = group[: (len(group) + 1) // 2]
        budget = batch_tokens(lengths[half], several[half], layout)
        left = [*group, *(place for other in others for place in other)]
        again = groups_under(lengths[left].tolist(), budget, layout, several[left].tolist())
        groups = [[left[place] for place in places] for places in again]
    return found


def over_step(
    run: Callable[[Sequence[int]], Result], step: Step, budget: int, layout: Layout, device: Any, what: str
) -> list[tuple[list[int], Result]]:
    """:func:`in_groups` of this process's examples of ``step``, the longest first: (places, result) of each micro-batch.
    ``what`` they are for, in an error."""
    mine = share_by_length(step)
    sizes = step.data.sizes(step.rows[mine], layout)
    found = in_groups(
        lambda group: run([mine[index] for index in group]), sizes, budget, layout, device,
        lambda index: f"{what} of {step.name(mine[index])}",
    )  # fmt: skip
    return [([mine[index] for index in group], result) for group, result in found]


def _tried(run: Callable[[list[int]], Any], group: list[int]) -> tuple[bool, Any]:
    """(False, None) where the group does not fit (returned, not raised: a traceback holds tensors)."""
    try:
        return True, run(group)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return False, None
