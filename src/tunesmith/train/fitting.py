"""Rows that only go through the network (a reference, evaluation, predictions), as many at a time as fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.errors import OutOfMemoryError
from tunesmith.train import batching, machine


def in_groups(
    run: Callable[[list[int]], dict[Any, Any]],
    sizes: tuple[np.ndarray, np.ndarray],
    budget: int,
    packed: bool,
    device: Any,
    name: Callable[[int], str],
) -> list[dict[Any, Any]]:
    """``run`` of every micro-batch, in order. ``sizes``: tokens and rows of each example, see ``shared_prompts.sizes``.

    A micro-batch that does not fit is halved, and all later ones are kept as small: without gradients more rows go together than
    in a step, and they may be longer than any that was tried. Raises OutOfMemoryError, which begins with the ``name`` of an
    example's place, when one alone does not fit.
    """
    lengths, several = sizes
    groups = batching.micro_batches(lengths.tolist(), budget, packed, several.tolist())
    found = []
    while groups:
        group, *others = groups
        result = _tried(run, group)
        if result is not None:
            found.append(result)
            groups = others
            continue
        machine.release_memory(device)
        if len(group) == 1:
            size = batching.together(lengths[group], several[group], packed)
            raise OutOfMemoryError(
                f"{name(group[0])}: this row alone ({size} tokens) needs more memory than the machine has left.\n"
                "  Lower max_length (train.max_length, or --max-length), or take a smaller model."
            )
        half = group[: (len(group) + 1) // 2]
        budget = batching.together(lengths[half], several[half], packed)
        left = [*group, *(place for other in others for place in other)]
        again = batching.micro_batches(lengths[left].tolist(), budget, packed, several[left].tolist())
        groups = [[left[place] for place in places] for places in again]
    return found


def _tried(run: Callable[[list[int]], dict[Any, Any]], group: list[int]) -> dict[Any, Any] | None:
    """None where the group does not fit (returned, not raised: a traceback holds tensors)."""
    try:
        return run(group)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return None
