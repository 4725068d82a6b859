"""Rows made from Python's own library, with answers that are known to be true.

In reading order: wording (phrases in both languages), facts (what the syntax tree says); the kinds of rows:
questions, preferences, classify, tag; draw (the table of kinds, and how rows are drawn).
``tunesmith.data.read.library`` reads the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.synth.python.draw import KINDS, SPLITS, draw, stream
from tunesmith.synth.python.wording import WORDING

__all__ = ["KINDS", "SPLITS", "WORDING", "draw", "rows"]


def rows(kind: str, lang: str) -> Iterator[dict[str, Any]]:
    """All rows of a kind, well mixed, in an order that is always the same: ``builtin:KIND`` of a recipe."""
    return (one.row for one in stream(KINDS[kind], lang, 0, None))
