"""Values of a record before a format builds its row: nested fields, line ends, numbers that are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.data.formats.fields import parse_collection
from tunesmith.json_types import JsonObject

NUMERIC_FIELDS = {
    "label", "labels", "tags", "scores", "ranks", "margin", "chosen_score", "rejected_score", "answers", "is_impossible",
    "tools", "id",
}  # fmt: skip
"""Fields whose numbers are never converted to text: grades, positions, classes, schemas."""

STRUCTURED_FIELDS = NUMERIC_FIELDS | {"messages", "conversations", "history", "tokens"}
"""Fields whose value may be a list or a mapping; all others are text, or turns."""

TEXT_KEYS = ("content", "value", "text")
"""Keys of a turn, or of one part of its content, that hold text."""


def with_nested(value: JsonObject, columns: Iterable[str]) -> JsonObject:
    """Return ``value`` with a column ``a.b`` for field b of the object in column a, if the row has one.

    A part of the name that is a number is a position in a list. The object may be text of JSON or
    Python, as in a csv cell."""
    found = {}
    for column in columns:
        if column not in value:
            for part in _reach(value, column.split(".")):
                found[column] = part
    return {**value, **found} if found else value


def _reach(value: Any, path: list[str]) -> Iterable[Any]:
    """Yield the value at the end of ``path``; nothing if it does not exist."""
    for key in path:
        if (parsed := parse_collection(value)) is not None:
            value = parsed
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return ()
    return (value,)


def has_carriage_returns(value: Any) -> bool:
    """Return True if a text in ``value`` has a line that ends in a carriage return and a line feed."""
    if isinstance(value, str):
        return "\r\n" in value
    if isinstance(value, Mapping):
        return any(map(has_carriage_returns, value.values()))
    return isinstance(value, list | tuple) and any(map(has_carriage_returns, value))


def unify_line_ends(value: Any) -> Any:
    """Return ``value`` with the line end ``\\n`` in all of its texts."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if not has_carriage_returns(value):
        return value
    if isinstance(value, Mapping):
        return {key: unify_line_ends(item) for key, item in value.items()}
    return [unify_line_ends(item) for item in value]


def numbers_to_text(value: Any) -> Any:
    """Return ``value`` with its numbers as text: alone, in lists, and as content of turns."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return [numbers_to_text(item) for item in value]
    if isinstance(value, Mapping):
        return {key: numbers_to_text(item) if key in TEXT_KEYS else item for key, item in value.items()}
    return value
