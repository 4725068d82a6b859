"""Which keys the queries of a packed row see: pieces that stand alone, and answers that go on where a shared prefix ended.

A row is cut into pieces of ``segments`` tokens. ``behind`` names for each the piece that it continues, or -1: prefix, answer 1,
answer 2 are (-1, 0, 0). An answer sees its prefix and, causally, itself; no other answer. So each is what it would be in a row
``prefix + answer`` of its own, while the prefix is computed once.

A prefix and the first answer behind it are one causal stretch, as if they were a single piece. Only the further answers have keys
that do not stand right before their queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` queries from ``start``. Each sees ``ahead`` keys of its family's prefix, and causally those from ``start``."""

    start: int
    length: int
    ahead: int

    @property
    def keys(self) -> int:
        return self.ahead + self.length


@dataclass(frozen=True, slots=True)
class Family:
    """``length`` tokens from ``start`` on, that see only each other. A prefix, if there is one, stands at ``start``."""

    start: int
    length: int
    runs: tuple[Run, ...]

    def keys(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """The keys or values that ``run`` sees. ``x`` (heads, tokens of the whole row, dim) -> (heads, run.keys, dim)."""
        own = x[:, run.start : run.start + run.length]
        return torch.cat([x[:, self.start : self.start + run.ahead], own], dim=1) if run.ahead else own


@lru_cache(maxsize=64)
def families(segments: tuple[int, ...], behind: tuple[int, ...] | None = None) -> tuple[Family, ...]:
    """The row's pieces, in order. Raises ValueError where ``behind`` names anything but the last piece that stands alone."""
    if behind is None:
        behind = (-1,) * len(segments)
    if len(behind) != len(segments):
        raise ValueError(
            f"behind has {len(behind)} numbers for {len(segments)} pieces; expected one for each"
        )
    found: list[tuple[int, list[Run]]] = []
    start, first = 0, -1  # first: the piece that the current family begins with
    for number, (length, before) in enumerate(zip(segments, behind, strict=True)):
        if before < 0:
            found.append((start, [Run(start, length, 0)]))
            first = number
        elif before != first:
            raise ValueError(
                f"behind[{number}] is {before}; expected -1, or {first}, the last piece before it that stands alone"
            )
        elif number == first + 1:
            begin, runs = found[-1]
            runs[0] = Run(begin, start + length - begin, 0)
        else:
            found[-1][1].append(Run(start, length, segments[first]))
        start += length
    return tuple(
        Family(begin, runs[-1].start + runs[-1].length - begin, tuple(runs)) for begin, runs in found
    )


def longest(segments: tuple[int, ...], behind: tuple[int, ...] | None = None) -> int:
    """The most keys that a query sees."""
    return max(run.keys for family in families(segments, behind) for run in family.runs)


def shares(keywords: dict[str, Any]) -> bool:
    """Whether the keywords of a forward are those of a row in which answers share a prefix (by ``varlen``: ``key_places``)."""
    return keywords.get("behind") is not None or keywords.get("key_places") is not None
