"""Advice for a file whose layout is not that of its type: no header, a table in a .txt file, CoNLL in a
csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.data.data_config import Source
from tunesmith.data.formats.columns import TEXT
from tunesmith.data.formats.fields import FieldFault, check_text
from tunesmith.data.read.csv_table import NUMBER_COLUMNS, looks_like_data
from tunesmith.data.read.row_files import DELIMITERS, layout_of, looks_like
from tunesmith.data.read.text_file import ending
from tunesmith.data.row_problems import shorten
from tunesmith.errors import DataError

TABLES = (*DELIMITERS, ".txt")
"""Types of files whose first line may name the columns."""


def txt_layout(source: Source) -> str | None:
    """Return the layout of a .txt file if the recipe sets neither format nor columns; else None."""
    file = Path(source.path).expanduser()
    said = source.hub or source.format or source.columns
    return layout_of(file) if ending(file) == ".txt" and not said and file.is_file() else None


def prose_or_table(source: Source, names: Sequence[str]) -> DataError:
    """Return the error for a .txt file that looks like a table and would be read as one document per line."""
    text = next((name for name in names if name.casefold() in TEXT.columns), names[0])
    return DataError(
        f"{source.label}: its first line looks like the header of a table ({', '.join(names)}), but a line of a .txt file is a "
        f"document.\n  For the table name its column of text: columns: {{text: {text}}}. To train on the lines as they are, set "
        "format: text."
    )


def misread(source: Source, names: Sequence[str]) -> DataError | None:
    """Return the error if a wrong layout is why no format fits, else None.

    ``names``: the columns that were read.
    """
    for name in names:
        try:
            check_text(name, "column names")
        except FieldFault as fault:
            return DataError(f"{source.label}: {fault}")
    file = Path(source.path).expanduser()
    if source.hub or ending(file) not in TABLES or not file.is_file():
        return None
    if looks_like(file) == ".conll":
        return DataError(
            f"{source.label}: no format fits, and the lines look like CoNLL.\n"
            "  Set format: conll (on the command line: --format conll)."
        )
    if txt_layout(source) == "no header":
        return DataError(f"{source.label} is a table without a header line.\n  {NUMBER_COLUMNS}")
    if looks_like_data(names):
        first = ", ".join(map(shorten, names[:5]))
        return DataError(
            f"{source.label}: the first line does not look like column names: {first}.\n  {NUMBER_COLUMNS}"
        )
    return None
