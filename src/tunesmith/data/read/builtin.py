"""``builtin:NAME``: rows that need no file, made from the running Python.

Every machine has this real text, so a first run downloads nothing but the model. This module makes questions
about docstrings. ``tunesmith.synth.python`` makes the other kinds. It is built on this package, so data does
not import it but loads it by name when a recipe asks for one of its kinds.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tunesmith.data import text_windows
from tunesmith.data.read import library
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean

PREFIX = "builtin:"
MAKERS = "tunesmith.synth.python"

SAME_NAME = (
    "docstrings", "instructions", "summaries", "translations", "judged", "classify", "multilabel", "tag", "qa",
)  # fmt: skip
KINDS = {"preference": "preferences", **{kind: kind for kind in SAME_NAME}}
NAMES = {f"{PREFIX}{name}": (kind, "en") for name, kind in KINDS.items()}
NAMES |= {f"{PREFIX}{name}-ko": (kind, "ko") for name, kind in KINDS.items()}
"""Name -> (kind, language). Docstrings are in the order of the library, the other kinds are shuffled."""

ASKED = ("instruction", "question")
"""Columns that many rows word alike; they are not compared."""


class Makers(Protocol):
    """The interface of MAKERS: its file, and all rows of a kind in a fixed order."""

    __file__: str

    def rows(self, kind: str, lang: str) -> Iterator[JsonObject]: ...


def makers() -> Makers:
    module: Makers = importlib.import_module(MAKERS)  # type: ignore[assignment]
    return module


def rows(name: str) -> Iterator[tuple[JsonObject, int | None]]:
    """Rows of a built-in data set with their groups, in a fixed order. Raises DataError for an unknown name.

    Rows that share text outside their questions (see ``text_windows.SHARED``) are one group and are held out
    together: methods of the same name often have the same docstring, and one piece of code has several
    questions. A row that shares text with two groups is left out.
    """
    if name not in NAMES:
        raise DataError(f"unknown built-in data set {name!r}. {did_you_mean(name, NAMES)}")
    kind, lang = NAMES[name]
    return _grouped(_docstrings(lang) if kind == "docstrings" else makers().rows(kind, lang))


def _grouped(rows: Iterator[JsonObject]) -> Iterator[tuple[JsonObject, int | None]]:
    group_of: dict[int, int] = {}
    for row in rows:
        values = [value for key, value in row.items() if key not in ASKED]
        texts = [" ".join(value) if isinstance(value, list) else value for value in values]
        found = {one for text in texts if isinstance(text, str) for one in text_windows.fingerprints(text)}
        groups = {group_of[one] for one in found & group_of.keys()}
        if len(groups) < 2:
            group = min(groups or found, default=None)  # a hash of its first row, the same in another source
            if group is not None:
                group_of |= dict.fromkeys(found, group)
            yield row, group


def _docstrings(lang: str) -> Iterator[JsonObject]:
    """Rows of the built-in functions, then of the modules by name, each in the order of its file."""
    seen: set[str] = set()
    for name in library.modules():
        for _, row in library.docstrings(library.read_module(name), lang):
            if row["instruction"] not in seen:
                seen.add(row["instruction"])
                yield row


def content_hash(name: str) -> str:
    """Hash of everything that the rows are made from: the library's sources, Python's version, the makers."""
    content = hashlib.sha256(f"{name} {sys.version}".encode())
    code = [Path(library.__file__), *sorted(Path(makers().__file__).parent.glob("*.py"))]
    for path in [*(path for path in library.modules().values() if path), *code]:
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()
