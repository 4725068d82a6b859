"""Micro-batches that go through a network at the same time: how examples are grouped for it, and which of them run alone.

``models.lanes`` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush


def balanced(lengths: Sequence[int], share: int, lanes: int) -> list[list[int]]:
    """Return indices in groups of about equal length, at most ``share`` each: the smallest multiple of ``lanes``.

    One above ``share`` is a group by itself.
    """
    rest = sorted((-length, index) for index, length in enumerate(lengths) if length <= share)
    groups = [[index] for index, length in enumerate(lengths) if length > share]
    number = lanes * -(sum(length for length, _ in rest) // max(1, share * lanes))
    while rest:
        made = shared_out([-length for length, _ in rest], min(number, len(rest)))
        if max(-sum(rest[place][0] for place in group) for group in made) <= share:
            return groups + [sorted(rest[place][1] for place in group) for group in made]
        number += lanes
    return groups


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
