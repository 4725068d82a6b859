"""The tokens that several sequences begin with, once in a batch: the prompt of several responses, or a system message.

An example holds the common prefix once, then the rest of each response: ``input_ids`` (P + A_1 + ... + A_K,)
and ``answers`` (P, A_1, ..., A_K). Responses are numbered through the whole batch, in order.

Rows and sampled answers are one example each, a prompt and its answer: :func:`join` makes such an example of neighbours
that begin alike, by the length ``shared`` of each (see :func:`prefixes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import Batch, Example, Layout

MOST_TOGETHER = 64
"""Most examples of a family: more would not be in one micro-batch."""
LEAST_SAVED = 1 / 16
"""Smallest share of a step's tokens that is worth computing beginnings once: attention is split into more parts for it."""


class Families(NamedTuple):
    """The family of each of n examples, int64 (n,) each. Its members have the same ``number``, and begin with the same
    tokens, as many as ``beginning``. The members of a batch that are neighbours share these tokens."""

    number: np.ndarray
    beginning: np.ndarray


class Sizes(NamedTuple):
    """Tokens and rows that each of n examples takes in a batch, int64 (n,) each."""

    tokens: np.ndarray
    """Packed: the tokens that the example adds. Padded: those of its longest row."""
    rows: np.ndarray
    families: Families | None = None
    """Examples that begin alike, where a batch holds their beginning once; None = no two examples do."""

    def of(self, places: Sequence[int]) -> Sizes:
        """Return the sizes of the examples at ``places``."""
        chosen = list(places)
        families = None if self.families is None else Families(*(one[chosen] for one in self.families))
        return Sizes(self.tokens[chosen], self.rows[chosen], families)

    def packed(self, places: Sequence[int]) -> int:
        """Return the tokens of a packed batch of the examples at ``places``, in this order."""
        tokens = int(self.tokens[list(places)].sum())
        if self.families is None:
            return tokens
        number, beginning = self.families
        return tokens - sum(int(beginning[b]) for a, b in pairwise(places) if number[a] == number[b])


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
    """Return the first tokens of each prompt to compute once for all prompts that begin with them; 0 = none.

    The prompts, int32 each, are sorted, and families are cut from this order so that the fewest tokens are computed: whole
    prompts for several answers to each, the system message for different questions after it."""
    order = sorted(range(len(prompts)), key=lambda number: prompts[number].tobytes())
    common = [0, *(_common(prompts[a], prompts[b]) for a, b in pairwise(order))]
    saved, families = [0], [(0, 0)]  # of the first n prompts; the last family: its first prompt, its tokens
    for end in range(1, len(order) + 1):
        best, family = saved[end - 1], (end - 1, 0)
        tokens = common[end - 1]
        for first in range(end - 2, max(-1, end - 1 - MOST_TOGETHER), -1):
            tokens = min(tokens, common[first + 1])
            if not tokens:
                break
            if (found := saved[first] + (end - 1 - first) * tokens) > best:
                best, family = found, (first, tokens)
        saved.append(best)
        families.append(family)
    shared, end = [0] * len(order), len(order)
    while end:
        first, tokens = families[end]
        for place in order[first:end]:
            shared[place] = tokens
        end = first
    return shared


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many first tokens of ``a`` and ``b`` are equal."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def beginnings(examples: Sequence[Example]) -> list[int] | None:
    """Return ``shared`` of each example, at most the tokens before the one that predicts its first target.

    None where a batch of all of them would save too few tokens. ``examples`` have ``supervised``."""
    shared = prefixes([
        example["input_ids"][: int(np.argmax(example["supervised"][1:])) if len(example["supervised"]) > 1 else 0]
        for example in examples
    ])  # fmt: skip
    found = families(
        [{**example, "shared": np.array([n])} for example, n in zip(examples, shared, strict=True)]
    )
    again = found.number != np.arange(len(examples))
    tokens = sum(len(example["input_ids"]) for example in examples)
    return shared if found.beginning[again].sum() >= LEAST_SAVED * tokens else None


def _prefix(example: Example) -> np.ndarray:
    """The first ``shared`` tokens; none without this key."""
    given = example.get("shared")
    return example["input_ids"][: 0 if given is None else int(given[0])]


def families(examples: Sequence[Example]) -> Families:
    """Return the families of examples with the same prefix. Their number is the index of their first member."""
    first: dict[bytes, int] = {}
    number, beginning = np.arange(len(examples)), np.zeros(len(examples), np.int64)
    for index, example in enumerate(examples):
        if len(prefix := _prefix(example)):
            number[index], beginning[index] = first.setdefault(prefix.tobytes(), index), len(prefix)
    return Families(number, beginning)


def join(examples: Sequence[Example], shared: bool) -> list[Example]:
    """Return the examples with a prompt and its answer each as examples with ``answers``, in order.

    ``shared``: neighbours with the same prefix become one."""
    groups: list[list[Example]] = []
    before = np.zeros(0, np.int32)
    for example in examples:
        prefix = _prefix(example) if shared else before
        if len(prefix) and np.array_equal(prefix, before):
            groups[-1].append(example)
        else:
            groups.append([example])
        before = prefix
    joined = []
    for group in groups:
        prefix = _prefix(group[0])
        parts = [example["input_ids"][len(prefix) :] for example in group]
        joined.append({
            "input_ids": np.concatenate([prefix, *parts]),
            "answers": np.array([len(prefix), *map(len, parts)], np.int32),
        })  # fmt: skip
    return joined


def with_targets(examples: Sequence[Example], layout: Layout) -> Batch:
    """:func:`arrange`, with the targets of a language model: positions, labels (targets,).

    ``lengths``: targets of each example, on the host. The first token of an example is no target, because no token
    predicts it. A shared layout holds the ``shared`` tokens of neighbours once."""
    batch, places = arrange(join(examples, layout.packed and layout.shared), layout)
    targets = [np.flatnonzero(example["supervised"][1:]) + 1 for example in examples]
    positions = [place[tokens - 1] for place, tokens in zip(places, targets, strict=True)]
    labels = [example["input_ids"][tokens] for example, tokens in zip(examples, targets, strict=True)]
    arrays = pack.tensors(positions=np.concatenate(positions), labels=np.concatenate(labels).astype(np.int64))
    return {**batch, **arrays, "lengths": [len(tokens) for tokens in targets]}
