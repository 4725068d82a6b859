"""Micro-batches that go through a network at the same time: how examples are grouped for it, and which of them run alone.

``models.lanes`` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from tunesmith.data.batch.shared_prompts import Families, Sizes

MOST_BALANCED = 512
"""Most examples of families that :func:`balanced` groups: the time grows with examples times groups."""


def balanced(sizes: Sizes, share: int, lanes: int) -> list[list[int]]:
    """Return indices in groups of about as many tokens, at most ``share`` each: the smallest multiple of ``lanes``.

    One above ``share`` is a group by itself. The members of a family are neighbours in each group.
    """
    tokens, families = sizes.tokens, sizes.families
    alone = [[int(index)] for index in np.flatnonzero(tokens > share)]
    rest = sorted(np.flatnonzero(tokens <= share).tolist(), key=lambda index: -tokens[index])

    def family(index: int) -> tuple[int, int]:
        return (0 if families is None else int(families.number[index])), index

    number = lanes * -(-sizes.packed(sorted(rest, key=family)) // max(1, share * lanes))
    while rest:
        lengths, count, of_rest = tokens[rest].tolist(), min(number, len(rest)), sizes.of(rest).families
        made = (
            shared_out(lengths, count) if of_rest is None else _families_shared_out(lengths, count, of_rest)
        )
        groups = [sorted((rest[place] for place in group), key=family) for group in made if group]
        if max(map(sizes.packed, groups)) <= share:
            return alone + groups
        number += lanes
    return alone


def shared_out(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Return indices in ``number`` groups of about equal length, where ``lengths`` descend.

    The longest that is left joins the shortest group (Graham 1969).
    """
    groups: list[list[int]] = [[] for _ in range(number)]
    shortest = [(0, place) for place in range(number)]
    for index, length in enumerate(lengths):
        used, place = heappop(shortest)
        groups[place].append(index)
        heappush(shortest, (used + length, place))
    return groups


def _families_shared_out(lengths: Sequence[int], number: int, families: Families) -> list[list[int]]:
    """:func:`shared_out`, where the beginning of a family counts once in each group.

    An example joins the group that is then the shortest."""
    groups: list[list[int]] = [[] for _ in range(number)]
    used, held = [0] * number, [set[int]() for _ in range(number)]
    for index, length in enumerate(lengths):
        family, beginning = int(families.number[index]), int(families.beginning[index])
        after = [
            total + length - beginning * (family in there) for total, there in zip(used, held, strict=True)
        ]
        place = after.index(min(after))
        groups[place].append(index)
        held[place].add(family)
        used[place] = after[place]
    return groups


def turns(tokens: Sequence[int], shares: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of ``shares``, one share for each lane, in the order in which the lanes are expected to end them."""
    ends: list[tuple[int, int]] = []
    for share in shares:
        done = 0
        for index in share:
            done += tokens[index]
            ends.append((done, index))
    return [index for _, index in sorted(ends)]


def count_alone(tokens: Sequence[int], budget: int, lanes: int) -> int:
    """Return how many micro-batches of ``tokens``, from the first on, run alone.

    In descending order, with ``lanes`` above 1: those that have more than ``budget`` tokens together with the ones after them.
    """
    if lanes == 1:
        return len(tokens)
    alone = 0
    while alone < len(tokens) and sum(tokens[alone : alone + lanes]) > budget:
        alone += 1
    return alone if len(tokens) - alone > 1 else len(tokens)


def count_together(tokens: Sequence[int], budget: int, lanes: int) -> int:
    """Return how many micro-batches of ``tokens``, from the first on, run at the same time; see :func:`count_alone`."""
    return 1 if count_alone(tokens, budget, lanes) else min(lanes, len(tokens))
