"""Did you mean ...? The valid names closest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names that fewest slips away (a letter changed, dropped, added or two swapped); [] when none is near.

    Near is at most a third of the letters wrong and never fewer than one; else a name that shares most of its letters.
    """
    names = sorted(set(valid))
    return mistyped(name, names) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)


def mistyped(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names that ``name`` may be with a slip or two, nearest only."""
    names = sorted(set(valid))
    slips = {other: _slips(name.lower(), other.lower()) for other in names}
    fewest = min(slips.values(), default=0)
    return [other for other in names if slips[other] == fewest] if fewest <= max(1, len(name) // 3) else []


def did_you_mean(name: str, valid: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """``Did you mean `epochs`? Valid: batch_size, epochs, ...``

    ``elsewhere``: what is meant when ``name`` is no slip of a valid name: it is a name, but of another place.
    """
    names = sorted(set(valid))
    meant = mistyped(name, names) or list(elsewhere) or nearest(name, names)
    close = " or ".join(f"`{other}`" for other in meant)
    return (f"Did you mean {close}? " if close else "") + "Valid: " + ", ".join(names)


def _slips(a: str, b: str) -> int:
    """Optimal string alignment distance (Damerau 1964): insertions, deletions, substitutions, swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        before, last, row = row, before, [i]
        for j in range(1, len(b) + 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a[i - 1] != b[j - 1])))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]
