"""The keys that the queries of a packed row see: separate segments, and answers that continue a shared prefix.

A row consists of segments of ``segments`` tokens. ``behind`` holds for each the index of the segment that it
continues, or -1: prefix, answer 1, answer 2 are (-1, 0, 0). An answer sees its prefix and, causally, itself,
as in a row ``prefix + answer``, but no other answer. A prefix and its first answer are one causal run, like a
single segment; the keys of further answers are not right before their queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` queries from ``start``; each sees ``ahead`` keys of the prefix, then causally its own."""

    start: int
    length: int
    ahead: int

    @property
    def keys(self) -> int:
        return self.ahead + self.length


@dataclass(frozen=True, slots=True)
class Family:
    """``length`` tokens from ``start`` that see only each other; a prefix, if any, begins at ``start``."""

    runs: tuple[Run, ...]

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def length(self) -> int:
        return self.runs[-1].start + self.runs[-1].length - self.start

    def keys(self, x: Tensor, run: Run) -> Tensor:
        """Return the keys or values that ``run`` sees: (heads, tokens, dim) -> (heads, run.keys, dim)."""
        own = x[:, run.start : run.start + run.length]
        return torch.cat([x[:, self.start : self.start + run.ahead], own], dim=1) if run.ahead else own


@lru_cache(maxsize=64)
def families(segments: tuple[int, ...], behind: tuple[int, ...] | None = None) -> tuple[Family, ...]:
    """Return the families of a row, in order.

    Raises ValueError where ``behind`` names another segment than the last one before it with -1.
    """
    if behind is None:
        behind = (-1,) * len(segments)
    if len(behind) != len(segments):
        raise ValueError(f"behind has {len(behind)} numbers; expected {len(segments)}, one for each segment")
    grouped: list[list[Run]] = []
    first = -1  # the segment with which the current family begins
    for number, (start, length, before) in enumerate(zip(accumulate(segments, initial=0), segments, behind)):
        if before < 0:
            grouped.append([Run(start, length, 0)])
            first = number
        elif before != first:
            raise ValueError(
                f"behind[{number}] is {before}; expected -1 or {first}, the last segment with -1"
            )
        elif number == first + 1:
            begin = grouped[-1][0].start
            grouped[-1] = [Run(begin, start + length - begin, 0)]
        else:
            grouped[-1].append(Run(start, length, segments[first]))
    return tuple(Family(tuple(runs)) for runs in grouped)


def most_keys(segments: tuple[int, ...], behind: tuple[int, ...] | None = None) -> int:
    """Return the most keys that a query sees."""
    return max(run.keys for family in families(segments, behind) for run in family.runs)


def shares_prefix(keywords: Mapping[str, object]) -> bool:
    """Return whether answers share a prefix, by the keywords of a forward (``key_places`` for ``varlen``)."""
    return keywords.get("behind") is not None or keywords.get("key_places") is not None
