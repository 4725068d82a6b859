"""Examples as training reads them: views of processed sources, without held-out rows, fit to a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import PADDED, Example, Layout
from tunesmith.data.batch.shared_prompts import Sizes
from tunesmith.data.store.cache import Entry, targets

Overlong = Literal["error", "split", "drop", "truncate"]


@dataclass(frozen=True)
class Views:
    """Parts of examples, int32[n]: index of the example, first token, tokens, loss units."""

    example: np.ndarray
    start: np.ndarray
    length: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.example)

    def keep(self, mask: np.ndarray) -> Views:
        if mask.all():  # no copies: there may be millions of rows
            return self
        return Views(self.example[mask], self.start[mask], self.length[mask], self.targets[mask])

    def count_rows(self, entry: Entry) -> int:
        """Count the different rows of these examples. The examples of one row are adjacent."""
        rows = entry.row[self.example]
        return int(np.count_nonzero(rows[1:] != rows[:-1])) + min(1, len(rows))


@dataclass(frozen=True)
class Encoded:
    """Examples ready for an objective's ``collate``; ``encoded[i]``: views of the file.

    ``source``   int32[n]: index into ``entries`` of each example
    ``weights``  float64[sources]: how often an epoch visits each source
    """

    entries: tuple[Entry, ...]
    paths: tuple[str, ...]
    weights: np.ndarray
    source: np.ndarray
    views: Views
    scratch: object = None
    """Keeps a temporary folder alive when there is no cache."""
    attached: tuple[Callable[[Encoded, int, Example], Example], ...] = ()
    """Functions (this data set, index, example) -> example with more arrays: see :meth:`attach`."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """The arrays of an example, ``row`` int64 (source, row of the file), and attached arrays."""
        example = self.stored(index)
        for add in self.attached:
            example = add(self, index, example)
        return example

    def stored(self, index: int) -> Example:
        """An example without attached arrays."""
        views, source = self.views, int(self.source[index])
        entry, place = self.entries[source], int(views.example[index])
        example = entry.example(place, int(views.start[index]), int(views.length[index]))
        example["row"] = np.array([source, entry.row[place]], np.int64)
        return example

    def attach(self, add: Callable[[Encoded, int, Example], Example]) -> Encoded:
        """Add arrays to each example when it is read: reference log-probabilities, another row's response."""
        return replace(self, attached=(*self.attached, add))

    @property
    def lengths(self) -> np.ndarray:
        """int32[n]: tokens of each example, a shared prompt counted once, also in reports."""
        return self.views.length

    @property
    def supervised(self) -> np.ndarray:
        """int32[n]: loss units of each example (supervised tokens that are targets)."""
        return self.views.targets

    @cached_property
    def shapes(self) -> np.ndarray | None:
        """int64 (3, n), see ``shared_prompts.shapes``; None where each example is a single sequence."""
        if not any("answers" in entry.values for entry in self.entries):
            return None
        out = np.zeros((3, len(self)), np.int64)
        for number, entry in enumerate(self.entries):
            mine = self.source == number
            if mine.any():
                of_entry = shared_prompts.shapes(entry.values["answers"], entry.starts["answers"])
                out[:, mine] = of_entry[:, self.views.example[mine]]
        return out

    def sizes(self, rows: np.ndarray | slice, layout: Layout) -> Sizes:
        """Return what the examples ``rows`` take in a micro-batch, see ``shared_prompts.sizes``."""
        shapes = None if self.shapes is None else self.shapes[:, rows]
        return shared_prompts.sizes(self.lengths[rows], shapes, layout)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: of an example, or of one response with its prompt."""
        return int(self.sizes(slice(None), PADDED).tokens.max())

    def groups(self) -> dict[tuple[int, int], int]:
        """Return the group (``rows.group_key``) of each row (source, row of the file): that of its first example."""
        found: dict[tuple[int, int], int] = {}
        for number, entry in enumerate(self.entries):
            examples = self.views.example[self.source == number]
            keys = zip(entry.row[examples].tolist(), entry.group[examples].tolist(), strict=True)
            for row, group in keys:
                found.setdefault((number, row), group)
        return found

    def where(self, index: int) -> str:
        """``file:row`` that example ``index`` was made from."""
        source = int(self.source[index])
        return f"{self.paths[source]}:{int(self.entries[source].row[self.views.example[index]])}"


def fit(entry: Entry, chosen: np.ndarray, policy: Overlong, max_length: int) -> Views:
    """Apply a length policy to the examples ``chosen`` (indices) of ``entry``.

    ``split`` makes blocks that overlap by one token. The first token of a block is context only, so each
    token but an example's first is a target exactly once. ``truncate`` keeps the beginning. ``drop`` and
    ``error`` keep the examples that fit (under ``error`` the caller has checked that all do).
    """
    lengths = entry.length[chosen]
    if policy in ("drop", "error") and (lengths > max_length).any():
        chosen, lengths = chosen[lengths <= max_length], lengths[lengths <= max_length]
    over = lengths > max_length
    if not over.any():  # no copies: there may be millions of rows
        return Views(chosen, np.zeros(len(chosen), np.int32), lengths, entry.targets[chosen])
    if policy == "split":
        which, start, length = blocks(lengths, max_length)
    else:
        which, start = np.arange(len(chosen)), np.zeros(len(chosen), np.int64)
        length = np.minimum(lengths, max_length)
    example = chosen[which]
    units = entry.targets[example]
    for position in np.flatnonzero(over[which]):
        part = entry.example(int(example[position]), int(start[position]), int(length[position]))
        units[position] = targets(part) if "supervised" in part else 1
    return Views(example, start.astype(np.int32), length.astype(np.int32), units)


def blocks(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which example, start, length) of every block; ``max_length`` is at least 2."""
    step = max_length - 1
    count = np.maximum(1, -(-(lengths - 1) // step))
    which = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    start = number * step
    return which, start, np.minimum(max_length, lengths[which] - start)


def join(sources: Sequence[tuple[Entry, str, float, object]], views: Sequence[Views]) -> Encoded:
    """One ``Encoded`` of the views of several sources (entry, path, weight, scratch), in order."""
    source = np.repeat(np.arange(len(views), dtype=np.int32), [len(view) for view in views])
    whole = views[0]
    if len(views) > 1:
        arrays = zip(*((view.example, view.start, view.length, view.targets) for view in views))
        whole = Views(*map(np.concatenate, arrays))
    entries, paths, weights, scratch = zip(*sources)
    return Encoded(entries, paths, np.array(weights, np.float64), source, whole, scratch)
