"""Micro-batches that go through a network at the same time: how examples are grouped for it, and which of them run alone.

``models.lanes`` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.data.batch.shared_prompts import Families, Sizes


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
        made = shared_out(tokens[rest].tolist(), min(number, len(rest)), sizes.of(rest).families)
        groups = [sorted((rest[place] for place in group), key=family) for group in made if group]
        if max(map(sizes.packed, groups)) <= share:
            return alone + groups
        number += lanes
    return alone


def shared_out(lengths: Sequence[int], number: int, families: Families | None = None) -> list[list[int]]:
    """Return indices in ``number`` groups of about equal length, where ``lengths`` descend.

    The longest that is left joins the group that is then the shortest (Graham 1969); the beginning of its family counts once
    in each group.
    """
    groups: list[list[int]] = [[] for _ in range(number)]
    used, held = [0] * number, [set[int]() for _ in range(number)]
    for index, length in enumerate(lengths):
        if families is None:
            place = min(range(number), key=used.__getitem__)
        else:
            family, beginning = int(families.number[index]), int(families.beginning[index])
            after = [total - beginning * (family in there) for total, there in zip(used, held, strict=True)]
            place = min(range(number), key=after.__getitem__)
            length -= beginning * (family in held[place])
            held[place].add(family)
        groups[place].append(index)
        used[place] += length
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
