"""Several responses to one prompt in a batch: each prompt once, or once for each response.

An example holds the common prefix once, then the rest of each response: ``input_ids`` (P + A_1 + ... + A_K,)
and ``answers`` (P, A_1, ..., A_K). Responses are numbered through the whole batch, in order.

Sampled answers are one example each, a prompt and its answer: :func:`join` makes such an example of neighbours
that begin alike, by the length ``shared`` of each (see :func:`prefixes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import Batch, Example, Layout


class Sizes(NamedTuple):
    """Tokens and rows that each of n examples takes in a batch, int64 (n,) each."""

    tokens: np.ndarray
    """Packed: the tokens that the example adds. Padded: those of its longest row."""
    rows: np.ndarray
    repeated: np.ndarray | None = None
    """int64 (n,): tokens that the batch does not hold again where the example before is in it, because both
    begin with them. None = no tokens of any example."""

    def of(self, places: Sequence[int]) -> Sizes:
        """Return the sizes of the examples at ``places``."""
        chosen = list(places)
        repeated = None if self.repeated is None else self.repeated[chosen]
        return Sizes(self.tokens[chosen], self.rows[chosen], repeated)


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


def sizes(lengths: np.ndarray, shapes: np.ndarray | None, layout: Layout) -> Sizes:
    """Return what examples take in a batch.

    ``shapes``: see :func:`shapes`; None where each example is a single sequence.
    """
    if shapes is None:
        return Sizes(lengths, np.ones_like(lengths))
    prefix, longest, count = shapes
    if not layout.packed:
        return Sizes(longest, count)
    return Sizes(lengths + (0 if layout.shared else (count - 1) * prefix), np.ones_like(count))


def separate(example: Example) -> list[np.ndarray]:
    """The tokens of each response with the prefix before it."""
    prefix, *responses = example["answers"].tolist()
    ids = example["input_ids"]
    bounds = pairwise(accumulate(responses, initial=prefix))
    return [np.concatenate([ids[:prefix], ids[start:end]]) for start, end in bounds]


def prefixes(prompts: Sequence[np.ndarray]) -> list[int]:
    """Return the tokens of each prompt to compute once for neighbours that begin with them.

    Either whole prompts, for several answers to each; or the beginning of all prompts (the chat template's, a
    system message), where that saves more."""
    first = prompts[0]
    common = min(len(prompt) for prompt in prompts)
    for prompt in prompts:
        differing = np.flatnonzero(first[:common] != prompt[:common])
        common = int(differing[0]) if len(differing) else common
    distinct = {prompt.tobytes(): len(prompt) for prompt in prompts}
    saved = sum(len(prompt) for prompt in prompts) - sum(distinct.values())
    if common * (len(prompts) - 1) > saved:
        return [common] * len(prompts)
    return [len(prompt) for prompt in prompts]


def _prefix(example: Example) -> np.ndarray:
    """The first ``shared`` tokens; by default the prompt, which ends where ``supervised`` begins."""
    given = example.get("shared")
    return example["input_ids"][: int(np.argmax(example["supervised"]) if given is None else given[0])]


def repeated(examples: Sequence[Example]) -> np.ndarray:
    """int64 (n,): tokens of each example's prefix if it is that of the example before, else 0."""
    found, before = np.zeros(len(examples), np.int64), np.zeros(0, np.int32)
    for number, example in enumerate(examples):
        prefix = _prefix(example)
        if np.array_equal(prefix, before):
            found[number] = len(prefix)
        before = prefix
    return found


def join(examples: Sequence[Example], shared: bool) -> list[Example]:
    """Return the examples with a prompt and its answer each as examples with ``answers``, in order.

    ``shared``: neighbours with the same prefix become one."""
    families: list[list[Example]] = []
    for example, tokens in zip(examples, repeated(examples), strict=True):
        if shared and tokens:
            families[-1].append(example)
        else:
            families.append([example])
    joined = []
    for family in families:
        prefix = _prefix(family[0])
        parts = [example["input_ids"][len(prefix) :] for example in family]
        joined.append({
            "input_ids": np.concatenate([prefix, *parts]),
            "answers": np.array([len(prefix), *map(len, parts)], np.int32),
        })  # fmt: skip
    return joined
