"""Examples as training sees them: views on processed sources, with the length policy and the held-out share applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import Layout
from tunesmith.data.store.cache import Entry, Example

Overlong = Literal["error", "split", "drop", "truncate"]


@dataclass(frozen=True)
class Views:
    """Stretches of examples: ``example`` index, ``start`` and ``length`` in tokens, ``targets`` = loss units in it; all int32."""

    example: np.ndarray
    start: np.ndarray
    length: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.example)

    def keep(self, mask: np.ndarray) -> Views:
        return Views(self.example[mask], self.start[mask], self.length[mask], self.targets[mask])


@dataclass(frozen=True)
class Encoded:
    """Examples ready for an objective's ``collate``; ``encoded[i]`` maps the array's names to arrays (views of the file).

    ``lengths``, ``supervised``   int32[n]: tokens, and loss units (supervised tokens that are targets), of each example
    ``source``                    int32[n]: which source it came from
    ``weights``                   float64[sources]: how often each source is seen per epoch
    """

    entries: tuple[Entry, ...]
    paths: tuple[str, ...]
    weights: np.ndarray
    source: np.ndarray
    views: Views
    scratch: object = None
    """Keeps a temporary folder alive when there is no cache."""
    attach: tuple[Callable[[Encoded, int, Example], Example], ...] = ()
    """Functions (this data set, index, example) -> example that add arrays no file has: a reference, another row's answer."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Its arrays, and ``row``: int64 (source, row of the file); and what is attached."""
        example = self.bare(index)
        for add in self.attach:
            example = add(self, index, example)
        return example

    def bare(self, index: int) -> Example:
        """An example without what is attached to it."""
        views, source = self.views, int(self.source[index])
        entry, place = self.entries[source], int(views.example[index])
        example = entry.example(place, int(views.start[index]), int(views.length[index]))
        example["row"] = np.array([source, entry.row[place]], np.int64)
        return example

    def attaching(self, add: Callable[[Encoded, int, Example], Example]) -> Encoded:
        """The same examples with what ``add`` adds to each; see ``attach``."""
        return replace(self, attach=(*self.attach, add))

    @property
    def lengths(self) -> np.ndarray:
        return self.views.length

    @property
    def supervised(self) -> np.ndarray:
        return self.views.targets

    @cached_property
    def shapes(self) -> np.ndarray | None:
        """int64 (3, n), see ``pairs.shapes``; None where examples are sequences and have no answers."""
        if not any("answers" in entry.values for entry in self.entries):
            return None
        found = np.zeros((3, len(self)), np.int64)
        for number, entry in enumerate(self.entries):
            mine = self.source == number
            if mine.any():
                of_entry = shared_prompts.shapes(entry.values["answers"], entry.starts["answers"])
                found[:, mine] = of_entry[:, self.views.example[mine]]
        return found

    def sizes(self, rows: np.ndarray | slice, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, rows) that examples take in a micro-batch, see ``pairs.sizes``. Their ``lengths`` count a shared prompt once,
        and so do all reports."""
        lengths = self.lengths[rows]
        if self.shapes is None:
            return lengths, np.ones_like(lengths)
        return shared_prompts.sizes(lengths, self.shapes[:, rows], layout)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: of an example, or of one answer with its prompt."""
        return int(self.sizes(slice(None), Layout(packed=False))[0].max())

    def where(self, index: int) -> str:
        """``file:row`` that example ``index`` was made from."""
        source = int(self.source[index])
        return f"{self.paths[source]}:{int(self.entries[source].row[self.views.example[index]])}"


def fit(entry: Entry, chosen: np.ndarray, policy: Overlong, max_length: int) -> Views:
    """The examples ``chosen`` (indices) of ``entry`` under a length policy.

    ``split``: blocks that overlap by one token, the first of which is context only, so that each token but an example's
    first is a target exactly once. ``truncate`` keeps the beginning, ``drop`` and ``error`` keep only what fits (under
    ``error`` the caller has made sure that all does).
    """
    lengths = entry.length[chosen]
    over = lengths > max_length
    if policy in ("drop", "error") and over.any():
        chosen, lengths, over = chosen[~over], lengths[~over], np.zeros(0, np.bool_)
    if not over.any():  # no copies of what may be millions of rows
        return Views(chosen, np.zeros(len(chosen), np.int32), lengths, entry.targets[chosen])
    if policy == "split":
        which, start, length = blocks(lengths, max_length)
    else:
        which, start, length = (
            np.arange(len(chosen)),
            np.zeros(len(chosen), np.int64),
            np.minimum(lengths, max_length),
        )
    example = chosen[which]
    targets = entry.targets[example]
    for position in np.flatnonzero(over[which]):
        part = entry.example(int(example[position]), int(start[position]), int(length[position]))
        targets[position] = np.count_nonzero(part["supervised"][1:]) if "supervised" in part else 1
    return Views(example, start.astype(np.int32), length.astype(np.int32), targets)


def blocks(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which example, start, length) of every block; ``max_length`` is at least 2."""
    step = max_length - 1
    count = np.maximum(1, -(-(lengths - 1) // step))
    which = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    start = number * step
    return which, start, np.minimum(max_length, lengths[which] - start)


def join(
    entries: Sequence[Entry],
    paths: Sequence[str],
    weights: Sequence[float],
    views: Sequence[Views],
    scratch: object = None,
) -> Encoded:
    """One ``Encoded`` of the views of several sources, in order."""
    source = np.repeat(np.arange(len(views), dtype=np.int32), [len(view) for view in views])
    names = ("example", "start", "length", "targets")
    whole = (
        views[0]
        if len(views) == 1
        else Views(*(np.concatenate([getattr(view, name) for view in views]) for name in names))
    )
    return Encoded(tuple(entries), tuple(paths), np.asarray(weights, np.float64), source, whole, scratch)
