"""Find the column of each field of a format: by the names that the format knows, or by the mapping."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from tunesmith.data.formats.fields import Field, Format
from tunesmith.errors import DataError
from tunesmith.suggestions import did_you_mean

Names = str | tuple[str, ...]
"""The column of a field, or several columns."""


def fold(name: str) -> str:
    """Return the form in which column names are compared: NFC, without case and outer spaces."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def find_columns(part: Field, asked: Names | None, folded: Mapping[str, str]) -> tuple[Names, str | None]:
    """Return the columns of a field and the first missing name.

    The columns are one name, or a tuple of all that the recipe lists; () if they are not in the file.
    """
    names = as_tuple(part.columns if asked is None else asked)
    keys = {name: folded.get(fold(name)) for name in names}
    present = tuple(key for key in keys.values() if key is not None)
    lacking = next((name for name, key in keys.items() if key is None), None)
    if isinstance(asked, tuple):
        return present if lacking is None else (), lacking
    return present[0] if present else (), lacking


def _by_field(mapped: Mapping[str, Names], form: Format) -> dict[str, Names]:
    """Return the mapping with the names of the format's fields as keys; other keys stay as they are.

    A key may be a column name that the format knows instead of the field's name: ``score`` for ``label``."""
    fields = {part.name: part.name for part in form.fields}
    fields = {column: part.name for part in form.fields for column in part.columns} | fields
    return {fields.get(name, name): to for name, to in mapped.items()}


def with_fields(
    forms: Sequence[Format], columns: Mapping[str, Names], path: str
) -> list[tuple[Format, dict[str, Names]]]:
    """Return the formats that have all fields of ``columns``, each with the mapping of its fields."""
    exact = [form for form in forms if columns.keys() <= {part.name for part in form.fields}]
    pairs = [(form, dict(columns) if exact else _by_field(columns, form)) for form in exact or forms]
    having = [(form, to) for form, to in pairs if to.keys() <= {part.name for part in form.fields}]
    known = {part.name: part.several for form in forms for part in form.fields}
    aliases = {column for form in forms for part in form.fields for column in part.columns}
    for name, asked in columns.items():
        if name not in known and name not in aliases:
            raise DataError(f"{path}: columns: no format has a field {name!r}. {did_you_mean(name, known)}")
        if not isinstance(asked, str) and not known.get(name):
            several = ", ".join(name for name, takes_several in known.items() if takes_several) or "none"
            raise DataError(
                f"{path}: columns: {name!r} takes one column, got a list ({', '.join(asked)}). "
                f"Fields that take several: {several}."
            )
    if not having:
        lists = "; ".join(f"{form.name}: {', '.join(part.name for part in form.fields)}" for form in forms)
        raise DataError(
            f"{path}: columns: no format has all of the fields {', '.join(columns)}. Fields by format: {lists}"
        )
    return having
