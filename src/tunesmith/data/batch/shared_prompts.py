"""Several responses to one prompt in a batch: each prompt once, or once for each response.

An example holds the common prefix once, then the rest of each response: ``input_ids`` (P + A_1 + ... + A_K,)
and ``answers`` (P, A_1, ..., A_K). Responses are numbered through the whole batch, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import Batch, Example, Layout


def arrange(examples: Sequence[Example], layout: Layout) -> tuple[Batch, list[np.ndarray]]:
    """Return the batch, and the positions of each response with its prefix in the flattened batch, (P + A,).

    A shared layout holds each prefix once, then its responses: input_ids, position_ids (1, tokens);
    ``segments``, the lengths of these parts; ``behind``, for each part the index of the prefix that it
    continues, or -1. An empty prefix is no part. Else each response with its prefix is a row.
    """
    if not (layout.packed and layout.shared):
        rows = [row for example in examples for row in separate(example)]
        batch, starts = pack.arrange([{"input_ids": row} for row in rows], layout.packed)
        return batch, [start + np.arange(len(row)) for start, row in zip(starts, rows)]
    segments: list[int] = []
    behind: list[int] = []
    positions, places, start = [], [], 0
    for example in examples:
        prefix, *responses = example["answers"].tolist()
        prompt = start + np.arange(prefix)
        prompt_segment = len(segments) if prefix else -1
        if prefix:
            segments.append(prefix)
            behind.append(-1)
            positions.append(np.arange(prefix))
            start += prefix
        for length in responses:
            segments.append(length)
            behind.append(prompt_segment)
            positions.append(prefix + np.arange(length))
            places.append(np.concatenate([prompt, start + np.arange(length)]))
            start += length
    ids = np.concatenate([example["input_ids"] for example in examples])
    batch = pack.tensors(
        input_ids=ids.astype(np.int64)[None], position_ids=np.concatenate(positions).astype(np.int64)[None]
    )
    return {**batch, "segments": tuple(segments), "behind": tuple(behind)}, places


def shapes(answers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 (3, n): tokens of the prefix, of the longest response with its prefix, number of responses.

    ``answers``: those of n examples end to end; example i has ``answers[starts[i] : starts[i + 1]]``.
    """
    first = starts[:-1]
    prefix, own = answers[first].astype(np.int64), answers.astype(np.int64)
    own[first] = 0
    return np.stack([prefix, prefix + np.maximum.reduceat(own, first), np.diff(starts) - 1])


def sizes(lengths: np.ndarray, shapes: np.ndarray | None, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, rows), int64 (n,) each, that examples take in a batch.

    Packed: the tokens that each example adds, in one row. Padded: the tokens of its longest row, and how many
    rows it has. ``shapes``: see :func:`shapes`; None where each example is a single sequence.
    """
    if shapes is None:
        return lengths, np.ones_like(lengths)
    prefix, longest, count = shapes
    if not layout.packed:
        return longest, count
    return lengths + (0 if layout.shared else (count - 1) * prefix), np.ones_like(count)


def separate(example: Example) -> list[np.ndarray]:
    """The tokens of each response with the prefix before it."""
    prefix, *responses = example["answers"].tolist()
    ids = example["input_ids"]
    bounds = pairwise(accumulate(responses, initial=prefix))
    return [np.concatenate([ids[:prefix], ids[start:end]]) for start, end in bounds]
