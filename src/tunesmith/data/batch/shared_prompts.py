"""Several answers to one prompt in a batch: each prompt once, or once for each answer.

An example holds a common prefix once, then what each answer has after it: ``input_ids`` (P + A_1 + ... + A_K,) and ``answers``
(P, A_1, ..., A_K). Answers are numbered through the whole batch, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from tunesmith.data.batch import pack

Example = dict[str, np.ndarray]


def layout(examples: Sequence[Example], packed: bool, shared: bool) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(batch, for each answer the places of its tokens, prefix and own, in the flattened batch: int64 (P + A,)).

    ``shared`` (packed only): each prefix once, its answers after it; input_ids, position_ids (1, tokens); segments, the lengths
    of these pieces; ``behind``, for each piece the one that it continues, or -1. A prefix of no tokens is no piece. Else each
    answer is a segment, or a padded row, as ``pack.layout`` makes them.
    """
    import torch

    if not (packed and shared):
        rows = [row for example in examples for row in separate(example)]
        batch, starts = pack.layout([{"input_ids": row} for row in rows], packed)
        return batch, [start + np.arange(len(row)) for start, row in zip(starts, rows)]
    segments: list[int] = []
    behind: list[int] = []
    positions, places, start = [], [], 0
    for example in examples:
        prefix, *answers = example["answers"].tolist()
        ahead = start + np.arange(prefix)
        before = len(segments) if prefix else -1
        if prefix:
            segments.append(prefix)
            behind.append(-1)
            positions.append(np.arange(prefix))
            start += prefix
        for length in answers:
            segments.append(length)
            behind.append(before)
            positions.append(prefix + np.arange(length))
            places.append(np.concatenate([ahead, start + np.arange(length)]))
            start += length
    ids = np.concatenate([example["input_ids"] for example in examples]).astype(np.int64)
    shape = (1, len(ids))
    batch = {
        "input_ids": torch.from_numpy(ids.reshape(shape)),
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64).reshape(shape)),
        "segments": tuple(segments),
        "behind": tuple(behind),
    }
    return batch, places


def shapes(answers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 (3, n): tokens of the prefix, tokens of the longest answer with it, number of answers.

    ``answers``: those of n examples end to end; example i has ``answers[starts[i] : starts[i + 1]]``.
    """
    first = starts[:-1]
    prefix, own = answers[first].astype(np.int64), answers.astype(np.int64)
    own[first] = 0
    return np.stack([prefix, prefix + np.maximum.reduceat(own, first), np.diff(starts) - 1])


def sizes(lengths: np.ndarray, shapes: np.ndarray, packed: bool, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, rows), int64 (n,) each, that examples of so many tokens take in :func:`layout`: packed, what each adds, in 1 row;
    padded, the tokens of its longest row, of so many rows."""
    prefix, longest, count = shapes
    if not packed:
        return longest, count
    return lengths + (0 if shared else (count - 1) * prefix), np.ones_like(count)


def separate(example: Example) -> list[np.ndarray]:
    """The tokens of each answer with the prefix before it."""
    prefix, *answers = example["answers"].tolist()
    ids = example["input_ids"]
    ends = list(accumulate(answers, initial=prefix))
    return [np.concatenate([ids[:prefix], ids[end - length : end]]) for end, length in zip(ends[1:], answers)]
