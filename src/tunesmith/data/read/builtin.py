"""``builtin:NAME``: rows that a recipe can learn from without a file, made from the Python that runs.

Real text that everybody has, so a first run needs no download but the model.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.make.docstrings import docstrings
from tunesmith.data.make.draw import maker, stream
from tunesmith.data.make.library import sources
from tunesmith.errors import DataError
from tunesmith.nearest import did_you_mean

PREFIX = "builtin:"

NAMES = {
    "builtin:docstrings": ("docstrings", "en"),
    "builtin:docstrings-ko": ("docstrings", "ko"),
    "builtin:instructions": ("instructions", "en"),
    "builtin:instructions-ko": ("instructions", "ko"),
    "builtin:preference": ("preferences", "en"),
    "builtin:preference-ko": ("preferences", "ko"),
    **{f"builtin:{kind}": (kind, "en") for kind in ("classify", "multilabel", "tag", "qa")},
    **{f"builtin:{kind}-ko": (kind, "ko") for kind in ("classify", "multilabel", "tag", "qa")},
}
"""Name: kind and language. Docstrings come in the order of the library, instructions well mixed."""


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a built-in data set, in an order that is always the same. Raises DataError for an unknown name."""
    if name not in NAMES:
        raise DataError(f"unknown built-in data set {name!r}. {did_you_mean(name, NAMES)}")
    kind, lang = NAMES[name]
    return docstrings(lang) if kind == "docstrings" else (row for _, row in stream(maker(kind), lang, seed=0))


def digest(name: str) -> str:
    """Hash of all that the rows are made from: the library's sources, the built-in functions' documentation and the makers."""
    content = hashlib.sha256(f"{name} {sys.version}".encode())
    for path in [*sources(), *sorted((Path(__file__).parent.parent / "make").glob("*.py"))]:
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()
