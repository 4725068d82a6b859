"""What a maker of rows is: one file of this folder, which exports ``MAKER``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tunesmith.data.make.library import Module

Row = dict[str, Any]
Candidate = tuple[str, Row]
"""The group that a row belongs to, and the row. Rows are drawn evenly from the groups."""

LANGUAGES = ("en", "ko")
NO_ANSWER = "no answer"
"""The groups of questions that their context does not answer begin with this."""

Choice = TypeVar("Choice")


def anywhere(module: str) -> str | None:
    """One stratum: every module serves."""
    return "" if not module.startswith("encodings") else None  # a hundred tables with the same five functions


def nothing(lang: str) -> Iterator[Candidate]:
    """No rows."""
    return iter(())


@dataclass(frozen=True)
class Maker:
    """``candidates(module, lang, seed)``: every row that can be made of a module.

    about: by language, what of a row is real and what is made up. identity: columns in which rows differ. labels: what is
    counted of a row in the summary; None = its group. stratum: of a module's name; modules are read evenly from all strata,
    None = not used. questions: some have no answer. besides: rows in a language that come from no file of the library.
    subject: what a row is about; a second row about the same comes when there is nothing else left.
    """

    candidates: Callable[[Module, str, int], Iterator[Candidate]]
    about: dict[str, str]
    identity: tuple[str, ...]
    labels: Callable[[Row], Iterable[str]] | None = None
    stratum: Callable[[str], str | None] = anywhere
    questions: bool = False
    besides: Callable[[str], Iterator[Candidate]] = nothing
    subject: Callable[[Row], str] | None = None


def definition(code: str) -> str:
    """The first line of the function or class in some code: what rows about it have in common."""
    found = re.search(r"^(async )?(def|class) .*", code, re.MULTILINE)
    return found[0] if found else code


def pick(options: Sequence[Choice], *key: object) -> Choice:
    """One of ``options``, by a hash of ``key``: the same on every machine."""
    return options[number(*key) % len(options)]


def number(*key: object) -> int:
    """A number below 2**32 for ``key``, evenly spread."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=4).digest())


def coded(names: Iterable[str]) -> list[str]:
    """Each name in backquotes."""
    return [f"`{name}`" for name in names]


def listed(names: Sequence[str], lang: str) -> str:
    """``a, b and c``; Korean lists have no last word."""
    if lang == "ko" or len(names) < 2:
        return ", ".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
