"""Suggest the valid names closest to a mistyped one: "Did you mean ...?"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str]) -> list[str]:
    """Return the typo matches of ``name``, else the one valid name that shares most of its letters, else []."""
    names = sorted(set(valid))
    return typo_matches(name, names) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)


def typo_matches(name: str, valid: Iterable[str]) -> list[str]:
    """Return the valid names with the smallest edit distance to ``name``, letter case ignored.

    The distance may be one, or a third of the letters of ``name``; [] when every valid name is further away.
    """
    distances = {other: _edit_distance(name.lower(), other.lower()) for other in sorted(set(valid))}
    smallest = min(distances.values(), default=0)
    limit = max(1, len(name) // 3)
    return [other for other, distance in distances.items() if distance == smallest <= limit]


def did_you_mean(name: str, valid: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Return ``Did you mean `epochs`? Valid: batch_size, epochs, ...``

    ``elsewhere``: names to suggest when ``name`` is not a typo of a valid name, because it is valid in
    another part.
    """
    names = sorted(set(valid))
    matches = typo_matches(name, names) or list(elsewhere) or closest(name, names)
    suggested = " or ".join(f"`{match}`" for match in matches)
    return (f"Did you mean {suggested}? " if suggested else "") + "Valid: " + ", ".join(names)


def _edit_distance(a: str, b: str) -> int:
    """Optimal string alignment distance (Damerau 1964): insertions, deletions, substitutions, swaps of neighbours."""
    earlier: list[int] = []
    row = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        earlier, last, row = row, earlier, [i]
        for j in range(1, len(b) + 1):
            row.append(min(earlier[j] + 1, row[j - 1] + 1, earlier[j - 1] + (a[i - 1] != b[j - 1])))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]
