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

from tunesmith.data.read import library
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean

PREFIX = "builtin:"
MAKERS = "tunesmith.synth.python"

SAME_NAME = ("docstrings", "instructions", "judged", "classify", "multilabel", "tag", "qa")
KINDS = {"preference": "preferences", **{kind: kind for kind in SAME_NAME}}
NAMES = {f"{PREFIX}{name}": (kind, "en") for name, kind in KINDS.items()}
NAMES |= {f"{PREFIX}{name}-ko": (kind, "ko") for name, kind in KINDS.items()}
"""Name -> (kind, language). Docstrings are in the order of the library, the other kinds are shuffled."""


class Makers(Protocol):
    """The interface of MAKERS: its file, and all rows of a kind in a fixed order."""

    __file__: str

    def rows(self, kind: str, lang: str) -> Iterator[JsonObject]: ...


def makers() -> Makers:
    module: Makers = importlib.import_module(MAKERS)  # type: ignore[assignment]
    return module


def rows(name: str) -> Iterator[JsonObject]:
    """Rows of a built-in data set, always in the same order. Raises DataError for an unknown name."""
    if name not in NAMES:
        raise DataError(f"unknown built-in data set {name!r}. {did_you_mean(name, NAMES)}")
    kind, lang = NAMES[name]
    return _docstrings(lang) if kind == "docstrings" else makers().rows(kind, lang)


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
