"""``builtin:NAME``: rows that a recipe can learn from without a file, made from the Python that runs.

Real text that everybody has, so a first run needs no download but the model. Questions about docstrings are made
here. The other kinds come from ``tunesmith.synth.python``, which is built on this package. So data never imports it:
it is found by name, as an objective is, when a recipe asks for one of its kinds.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tunesmith.data.read import library
from tunesmith.errors import DataError
from tunesmith.suggestions import did_you_mean

PREFIX = "builtin:"
MAKERS = "tunesmith.synth.python"

SAME = ("docstrings", "instructions", "judged", "classify", "multilabel", "tag", "qa")
KINDS = {"preference": "preferences", **{kind: kind for kind in SAME}}
NAMES = {f"{PREFIX}{name}": (kind, "en") for name, kind in KINDS.items()}
NAMES |= {f"{PREFIX}{name}-ko": (kind, "ko") for name, kind in KINDS.items()}
"""Name: kind and language. Docstrings come in the order of the library, the others well mixed."""


class Makers(Protocol):
    """What MAKERS offers: its folder, and all rows of a kind in an order that is always the same."""

    __file__: str

    def rows(self, kind: str, lang: str) -> Iterator[dict[str, Any]]: ...


def makers() -> Makers:
    found: Makers = importlib.import_module(MAKERS)  # type: ignore[assignment]
    return found


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a built-in data set, in the same order each time. Raises DataError for an unknown name."""
    if name not in NAMES:
        raise DataError(f"unknown built-in data set {name!r}. {did_you_mean(name, NAMES)}")
    kind, lang = NAMES[name]
    return _docstrings(lang) if kind == "docstrings" else makers().rows(kind, lang)


def _docstrings(lang: str) -> Iterator[dict[str, str]]:
    """First the built-in functions, then the modules by name, each in the order of its file."""
    seen: set[str] = set()
    for name in library.modules():
        for _, row in library.docstrings(library.read_module(name), lang):
            if row["instruction"] not in seen:
                seen.add(row["instruction"])
                yield row


def digest(name: str) -> str:
    """Hash of all that the rows are made from: the library's sources, Python's version, the makers."""
    content = hashlib.sha256(f"{name} {sys.version}".encode())
    code = [Path(library.__file__), *sorted(Path(makers().__file__).parent.glob("*.py"))]
    for path in [*(path for path in library.modules().values() if path), *code]:
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()
