"""What a format is made of, and checks of single values: text that a tokenizer can take, JSON that a template can take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Row

Columns = Mapping[str, str | Sequence[str]]
"""Field of the format -> the column that stands for it, or several (then its value is {column: value})."""

Values = Mapping[str, Any]
"""Field of the format -> value; optional fields that the row lacks are absent."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a format and the column names it goes by, in any case. ``several``: columns of a mark each may stand for it."""

    name: str
    columns: tuple[str, ...]
    required: bool = True
    several: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """``build`` makes the row of the fields' values or raises FieldFault. ``prompt`` is the field that a ``prompt_template``
    replaces, ``answer`` those that it keeps. ``gold``: the field that rows to be predicted may lack. ``look``: what the values
    of the first rows say of the whole file; ``build`` gets it among the values, and under "gold" whether gold is wanted.

    ``marks``: columns that no other format has; a file with one of them is tried as this format first. ``by_name``: the
    format is never detected, the recipe has to name it."""

    name: str
    row: type
    fields: tuple[Field, ...]
    build: Callable[[Values], Row]
    prompt: str | None = None
    answer: tuple[str, ...] = ()
    gold: str | None = None
    look: Callable[[Sequence[Values]], dict[str, Any]] | None = None
    marks: tuple[str, ...] = ()
    by_name: bool = False


TOOLS = Field("tools", ("tools", "functions"), required=False)
SYSTEM = Field("system", ("system", "system_prompt"), required=False)


class FieldFault(Exception):
    """A field of a row is not what its format needs."""

    def __init__(self, field: str, expected: str, got: str, fix: str) -> None:
        super().__init__(f"{field}: expected {expected}, got {got}. {fix}")
        self.field, self.expected, self.got, self.fix = field, expected, got, fix


def text(value: Any, field: str) -> str:
    """Text with something in it."""
    if value is None:
        raise FieldFault(field, "text", "nothing (null)", f"Fill {field!r} in or delete the row.")
    clean(value, field)
    if not value.strip():
        got = "empty text" if not value else "only spaces"
        raise FieldFault(field, "text", got, f"Fill {field!r} in or delete the row.")
    return str(value)


def optional_text(value: Any, field: str) -> str:
    """Text, or nothing: a missing value is the empty string."""
    if value is None:
        return ""
    clean(value, field)
    return str(value)


def clean(value: Any, field: str) -> None:
    """Refuse what is not a string of whole Unicode characters without NUL."""
    if not isinstance(value, str):
        raise FieldFault(field, "text", shorten(value), "Write it as a string, in quotes.")
    if value.isascii():
        if "\0" in value:
            raise FieldFault(
                field,
                "text without NUL",
                f"a NUL character after {value.index(chr(0))} characters",
                "Remove it.",
            )
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how a byte that is not UTF-8 was kept
            got = f"the byte 0x{code - 0xDC00:02x} after {error.start} characters"
            raise FieldFault(
                field, "UTF-8 text", got, "Save the file as UTF-8 (iconv -f CP949 -t UTF-8, say)."
            ) from None
        got = f"half a surrogate pair (\\u{code:04x}) after {error.start} characters"
        raise FieldFault(field, "Unicode text", got, "Write the whole character.") from None
    if "\0" in value:
        raise FieldFault(
            field, "text without NUL", f"a NUL character after {value.index(chr(0))} characters", "Remove it."
        )


def clean_inside(value: Any, field: str) -> None:
    """``clean`` for every string in nested lists and objects."""
    if isinstance(value, str):
        clean(value, field)
    elif isinstance(value, dict):
        for key, item in value.items():
            clean(key, field)
            clean_inside(item, f"{field}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            clean_inside(item, f"{field}[{position}]")


def parsed(value: Any, field: str, what: str) -> Any:
    """A value that may have come as JSON text (csv columns and OpenAI's ``arguments`` do)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as error:
        raise FieldFault(field, what, f"{shorten(value)} ({error})", "Write valid JSON.") from None
