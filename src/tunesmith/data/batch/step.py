"""One optimiser step, and the source that steps come from.

A ``Step`` owns its examples: it splits them under a token budget, collates a part of them, and names them in
an error. The loop, the out-of-memory retry, the check for a finite loss, the forecast and the fast path use
the Step alone. So a step can hold rows of a file (``data.store.epochs``) or sampled responses (``Listed``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunesmith.data.batch import lane_groups, shared_prompts
from tunesmith.data.batch.pack import PACKED, Layout
from tunesmith.data.batch.pack import Batch as Batch
from tunesmith.data.batch.pack import Example as Example
from tunesmith.data.batch.shared_prompts import Families, Sizes
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    import torch

Collate = Callable[[Sequence[Example], Layout], Batch]


class Examples(Protocol):
    """Examples by number: mapped from a file (``data.store.encoded_rows``) or in memory (``Listed``)."""

    @property
    def lengths(self) -> np.ndarray:
        """int (n,): tokens of each example, a shared prompt counted once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def sizes(self, rows: np.ndarray | slice, layout: Layout) -> Sizes:
        """Return what the examples ``rows`` take in a micro-batch, in this order; see ``shared_prompts.sizes``."""

    def where(self, index: int) -> str:
        """Name of an example in an error: ``file:row``, ``rollout:prompt:sample``."""


@dataclass(frozen=True)
class Listed:
    """Examples in memory, with the name of each.

    ``shares``: their ``collate`` computes the ``shared`` tokens of neighbours once in a shared layout."""

    examples: Sequence[Example]
    names: Sequence[str]
    shares: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(example["input_ids"]) for example in self.examples], np.int64)

    def sizes(self, rows: np.ndarray | slice, layout: Layout) -> Sizes:
        if self.shares and layout.packed and layout.shared:
            families = Families(*(one[rows] for one in self._families))
            return Sizes(self.lengths[rows], np.ones_like(families.number), families)
        shapes = None
        if "answers" in self.examples[0]:
            answers = [example["answers"] for example in self.examples]
            starts = np.cumsum([0, *map(len, answers)])
            shapes = shared_prompts.shapes(np.concatenate(answers), starts)[:, rows]
        return shared_prompts.sizes(self.lengths[rows], shapes, layout)

    @cached_property
    def _families(self) -> Families:
        return shared_prompts.families(self.examples)

    def where(self, index: int) -> str:
        return self.names[index]


@dataclass(frozen=True)
class Micro:
    """Examples that go through the network together: ``places`` within the step, ``lengths`` in tokens.

    ``tokens``: what the network sees, padding and repeated prompts included. An ``idle`` one counts nothing:
    its process has no examples left, but the other processes need it in their collectives.
    """

    places: list[int]
    lengths: list[int]
    tokens: int
    batch: Batch
    idle: bool = False


@dataclass(frozen=True)
class Step:
    """One optimiser step: its ``number`` in the plan, counted from 1, and the examples ``rows`` (indices into
    ``data``) of all processes. A place is an index into ``rows``."""

    number: int
    data: Examples
    rows: np.ndarray
    collate: Collate

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """int (n,): tokens of each example."""
        return self.data.lengths[self.rows]

    def examples(self, places: Iterable[int] | None = None) -> list[Example]:
        """The examples at ``places``; by default all of them, in order."""
        return [self.data[int(row)] for row in (self.rows if places is None else self.rows[list(places)])]

    def name(self, place: int) -> str:
        return self.data.where(int(self.rows[place]))

    def names(self, places: Iterable[int] | None = None) -> list[str]:
        return [self.name(place) for place in (range(len(self)) if places is None else places)]

    def tokens(self, places: Sequence[int], layout: Layout) -> int:
        """Tokens of these examples as one micro-batch, padding included."""
        return batch_tokens(self.data.sizes(self.rows[list(places)], layout), layout)

    def micro(self, places: Sequence[int], layout: Layout, idle: bool = False) -> Micro:
        """Collate these examples as one micro-batch."""
        lengths = [int(length) for length in self.lengths[list(places)]]
        batch = self.collate(self.examples(places), layout)
        return Micro(list(places), lengths, self.tokens(places, layout), batch, idle)

    def share(self, process: int, processes: int) -> list[int]:
        """Places of one process: every ``processes``-th example."""
        return list(range(len(self)))[process::processes]

    def split(self, budget: int, layout: Layout, process: int = 0, processes: int = 1) -> list[list[int]]:
        """Places of each micro-batch of at most ``budget`` tokens, for one process.

        A process that needs fewer micro-batches than another splits its own further, while it can.
        """
        groups = [self.groups(self.share(rank, processes), budget, layout) for rank in range(processes)]
        return _split_until(groups[process], max(map(len, groups)))

    def micro_batches(
        self, budget: int, layout: Layout, process: int = 0, processes: int = 1, even: bool = False
    ) -> list[Micro]:
        """The micro-batches of one process. ``even``: idle ones until it has as many as any other."""
        made = [self.micro(places, layout) for places in self.split(budget, layout, process, processes)]
        if even:
            most = max(len(self.split(budget, layout, number, processes)) for number in range(processes))
            shortest = int(np.argmin(self.lengths))
            made += [self.micro([shortest], layout, idle=True) for _ in range(most - len(made))]
        return made

    def with_arrays(self, arrays: Sequence[Mapping[str, np.ndarray]]) -> Step:
        """Return the step with more arrays in each of its examples, in order."""
        examples = [{**example, **more} for example, more in zip(self.examples(), arrays, strict=True)]
        return replace(self, data=Listed(examples, self.names()), rows=np.arange(len(self)))

    def sharing_beginnings(self) -> Step:
        """Return the step whose examples name the first tokens that others of it begin with, too (``shared``).

        Returns the step itself where this saves little; see ``shared_prompts.beginnings``."""
        examples = self.examples()
        if (found := shared_prompts.beginnings(examples)) is None:
            return self
        sharing = [{**example, "shared": np.array([n])} for example, n in zip(examples, found, strict=True)]
        return replace(self, data=Listed(sharing, self.names(), shares=True), rows=np.arange(len(self)))

    def groups(self, places: Sequence[int], budget: int, layout: Layout) -> list[list[int]]:
        """The ``places`` of each micro-batch of at most ``budget`` tokens."""
        groups = groups_of(self.data.sizes(self.rows[list(places)], layout), budget, layout)
        return [[places[index] for index in group] for group in groups]


@dataclass(frozen=True)
class Plan:
    """Steps of a run: ``steps`` in all, ``steps_per_epoch`` (the last one of an epoch may be short).

    ``steps_per_iteration``: steps that a source makes together, of the answers that it sampled."""

    steps: int
    steps_per_epoch: int
    steps_per_iteration: int = 1

    def epoch(self, step: int) -> float:
        """Epochs done after ``step``."""
        return step / self.steps_per_epoch


class Source(Protocol):
    """The optimiser steps of a run.

    A source may skip steps (an iteration that stopped early); schedule, resume and end count the plan's.
    """

    @property
    def plan(self) -> Plan: ...

    def steps(self, start: int) -> Iterator[Step]:
        """Yield the steps from number ``start`` on; after ``load`` those of an uninterrupted run."""

    def preview(self, most: int) -> Sequence[Step]:
        """Steps like those to come, for the forecast of memory and time: at most ``most``, and the one with
        the longest example. Nothing is sampled for them."""

    def distinct(self) -> Step | None:
        """Every example of any step, each once, as one large step; None if they are not known beforehand."""

    def state(self) -> tuple[dict[str, torch.Tensor], JsonObject]:
        """(tensors by name, JSON): all that ``steps`` needs to continue after the last yielded step."""

    def load(self, tensors: Mapping[str, torch.Tensor], state: JsonObject) -> None:
        """Continue from a ``state``."""


def first_examples(source: Source) -> Step:
    """Two short examples of the first step, as a step, for the parity check of the fast path.

    They are the shortest ones, of those that begin alike where a batch computes their beginning once."""
    step = source.preview(1)[0]
    families = step.data.sizes(step.rows, PACKED).families
    places = list(range(len(step)))
    if families is not None:
        alike = np.flatnonzero(families.number == np.bincount(families.number).argmax()).tolist()
        places = alike if len(alike) > 1 else places
    chosen = sorted(places, key=lambda place: (step.lengths[place], step.rows[place]))[:2]
    return replace(step, rows=step.rows[chosen])


def groups_of(sizes: Sizes, budget: int, layout: Layout) -> list[list[int]]:
    """:func:`groups_under` for examples of these sizes.

    With lanes: groups of about equal size, as many as the lanes hold at the same time within ``budget``, the largest first.
    """
    lanes = layout.lanes
    if not layout.packed or batch_tokens(sizes, layout) < lanes * max(1, layout.lane_tokens):
        lanes = 1
    share = budget // lanes
    if lanes > 1 and (sizes.families is None or len(sizes.tokens) <= lane_groups.MOST_BALANCED):
        groups = lane_groups.balanced(sizes, share, lanes)
    else:
        groups = groups_under(sizes.tokens.tolist(), share, layout, sizes.rows.tolist(), sizes.families)
    if layout.lanes > 1:
        groups.sort(key=lambda group: -batch_tokens(sizes, layout, group))
    return groups


def groups_under(
    lengths: Sequence[int],
    budget: int,
    layout: Layout,
    rows_each: Sequence[int] | None = None,
    families: Families | None = None,
) -> list[list[int]]:
    """Indices of examples in groups of at most ``budget`` tokens, padding included.

    An example above the budget is a group by itself. Padded rows are grouped by length; packed rows stay in
    order, but for those of a family, which follow its first. ``rows_each``: how many padded rows each example takes
    (None = one). ``families``: see ``Sizes``.
    """
    packed = layout.packed
    order = list(range(len(lengths)))
    if not packed:
        order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    elif families is not None:
        order = np.argsort(families.number, kind="stable").tolist()
    groups: list[list[int]] = []
    used = longest = 0  # used: tokens, or padded rows
    for row in order:
        longest_now = max(longest, lengths[row])
        more = lengths[row] if packed else 1 if rows_each is None else rows_each[row]
        again = 0  # tokens that the group holds already
        if packed and families is not None and groups:
            alike = families.number[groups[-1][-1]] == families.number[row]
            again = int(families.beginning[row]) if alike else 0
        cost = used + more - again if packed else longest_now * (used + more)
        if groups and cost <= budget:
            groups[-1].append(row)
            used, longest = used + more - again, longest_now
        else:
            groups.append([row])
            used, longest = more, lengths[row]
    return groups


def batch_tokens(sizes: Sizes, layout: Layout, places: Sequence[int] | None = None) -> int:
    """Tokens of a micro-batch, padding included, of the examples at ``places`` in this order (None = all)."""
    chosen = list(range(len(sizes.tokens)) if places is None else places)
    if not layout.packed:
        return int(sizes.tokens[chosen].max() * sizes.rows[chosen].sum())
    return sizes.packed(chosen)


def heaviest_micro_batch(
    steps: Iterable[Step], budget: int, layout: Layout, process: int = 0, processes: int = 1
) -> tuple[Step, list[int]]:
    """The step and the places of the micro-batch with the most tokens, padding included, among ``steps``.

    With lanes: of the micro-batches that go through the network at the same time."""
    found: tuple[Step, list[int]] | None = None
    most = 0
    for step in steps:
        found = found or (step, [0])
        groups = step.split(budget, layout, process, processes)
        tokens = [step.tokens(places, layout) for places in groups]
        if layout.lanes > 1:  # the largest come first
            count = lane_groups.count_together(tokens, budget, layout.lanes)
            groups, tokens = [list(chain(*groups[:count]))], [sum(tokens[:count])]
        for places, size in zip(groups, tokens, strict=True):
            if size > most:
                found, most = (step, places), size
    assert found is not None, "a plan has at least one step"
    return found


def _split_until(groups: list[list[int]], number: int) -> list[list[int]]:
    """Halve the group of most examples until there are ``number`` groups, or each has one example."""
    while len(groups) < number and (most := max(groups, key=len, default=[])) and len(most) > 1:
        place, half = groups.index(most), len(most) // 2
        groups = [*groups[:place], most[:half], most[half:], *groups[place + 1 :]]
    return groups
