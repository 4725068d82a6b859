"""Rows made from Python's own library, with answers that are known to be true.

In reading order: ``wording`` (phrases in both languages), ``facts`` (what the syntax tree tells); the kinds
of rows in ``questions``, ``texts``, ``preferences``, ``classify`` and ``tag``; ``draw`` (the table of kinds, and how
rows are drawn). ``tunesmith.data.read.library`` reads the library.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.json_types import JsonObject
from tunesmith.synth.python.draw import KINDS, SPLITS, draw, stream
from tunesmith.synth.python.wording import WORDING

__all__ = ["KINDS", "SPLITS", "WORDING", "draw", "rows"]


def rows(kind: str, lang: str) -> Iterator[JsonObject]:
    """Yield all rows of a kind, well mixed, always in the same order: ``builtin:KIND`` of a recipe."""
    return (candidate.row for candidate in stream(KINDS[kind], lang, 0, None))
