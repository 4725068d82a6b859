"""Tables in text: csv and tsv files, and .txt files whose lines are rows of a table."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal, TextIO

from tunesmith.data.formats.columns import COLUMN_NAMES
from tunesmith.data.formats.fields import FieldFault, check_text
from tunesmith.data.row_problems import Record, RowProblem, shorten

LARGEST_FIELD = 1 << 27
"""Most characters of one csv field: the reader gives up on an unclosed quote there."""

COMPARED_LINES = 20
"""Number of first lines of a .txt file that are compared: in a table they have the same number of tabs."""

NUMBER = re.compile(r"[-+]?[\d.,]*\d")
SENTENCE = re.compile(r"[.?!。？！…]['\"”’)]*$|(?:\S+\s+){4}")
"""The end of a sentence, or more than four words: such a cell is text, not a column name."""

CLOSE_QUOTE = 'Close the quote; a quote inside a quoted field is written twice ("").'
NUMBER_COLUMNS = (
    "Write a header line, or name the columns by number: columns: {text: 1, label: 2} "
    "(on the command line: --column text=1 --column label=2)."
)


def read_table(
    handle: TextIO, path: str, delimiter: str | None, numbers: frozenset[str] = frozenset()
) -> Iterator[Record | RowProblem]:
    """Yield the rows after the header line. Quoted fields may contain line breaks.

    ``delimiter``: None = the most frequent of ``,``, ``;`` and tab in the header. ``numbers``: column numbers
    that the recipe maps. If the first line has no columns of these names, the file has no header, and its
    columns are named "1", "2", ..."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    start, first = next(((number, line) for number, line in enumerate(handle, 1) if line.strip()), (0, ""))
    if not first:
        return
    delimiter = delimiter or max(",;\t", key=first.count)
    lines: Iterator[str] = handle
    try:
        header = _parse_header(first, delimiter)
        if numbers and not numbers <= set(header):
            _check_no_header(header, numbers)
            header = [str(number) for number in range(1, len(header) + 1)]
            lines, start = itertools.chain([first], handle), start - 1
        else:
            _check_names(header)
    except FieldFault as fault:
        yield RowProblem(path, 1, "header", fault.expected, fault.got, fault.fix, start, fatal=True)
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    row = 0
    while True:
        line = start + 1 + reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row += 1
            unclosed = "end of data" in str(error) or "field limit" in str(error)
            got = "a quote that is never closed" if unclosed else str(error)
            if not unclosed and start + reader.line_num > line:
                last = start + reader.line_num
                got = f"a quote that opens on line {line} and closes inside a field of line {last}"
            yield RowProblem(path, row, "line", "a csv record", got, CLOSE_QUOTE, line, fatal=unclosed)
            continue
        if not values:
            continue
        row += 1
        if len(values) != len(header):
            expected = f"{len(header)} columns ({', '.join(header)})"
            fix = "Quote a field that contains the separator or a line break."
            last = start + reader.line_num
            got = f"{len(values)}" + (f" on lines {line} to {last}" if last > line else "")
            yield RowProblem(path, row, "columns", expected, got, fix if last == line else CLOSE_QUOTE, line)
        elif swallowing := [
            name for name, cell in zip(header, values) if _holds_rows(cell, delimiter, len(header))
        ]:
            got = f"lines {line} to {start + reader.line_num} of the file, with their separators, in one cell"
            yield RowProblem(path, row, swallowing[0], "a cell of one row", got, CLOSE_QUOTE, line)
        else:
            yield Record(path, row, line, dict(zip(header, values, strict=True)))


def _holds_rows(cell: str, delimiter: str, columns: int) -> bool:
    """Return True if a quoted cell has swallowed other rows, because a quote of theirs closed its own.

    In a tab-separated file, a line break and a tab in one cell are enough. With another separator, which text
    may contain, at least two whole lines of the cell must each have the columns of the table, three or
    more."""
    if "\n" not in cell:
        return False
    if delimiter == "\t":
        return "\t" in cell
    inside = cell.splitlines()[1:-1]
    return columns > 2 and len(inside) > 1 and all(line.count(delimiter) == columns - 1 for line in inside)


def _parse_header(line: str, delimiter: str) -> list[str]:
    """Return the cells of the first line. Raises FieldFault."""
    check_text(line, "header")
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        got = f"{shorten(line)} ({error})"
        raise FieldFault("header", "column names", got, "Correct the first line.") from None


def _check_names(header: Sequence[str]) -> None:
    """Raise FieldFault for a name that occurs twice."""
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        fix = "Rename one of them." if not looks_like_data(header) else NUMBER_COLUMNS
        raise FieldFault("header", "different column names", f"{doubled[0]!r} twice", fix)


def _check_no_header(cells: Sequence[str], numbers: frozenset[str]) -> None:
    """Raise FieldFault if the first line is a header, or lacks one of the columns ``numbers``."""
    asked = sorted(map(int, numbers))
    if beyond := [number for number in asked if not 1 <= number <= len(cells)]:
        fix = f"Map a column from 1 to {len(cells)}."
        raise FieldFault("header", f"a column {beyond[0]}", f"{len(cells)} columns", fix)
    if _has_column_name(cells):
        named = ", ".join(cells[number - 1] for number in asked)
        expected = "a first row of values, because columns are mapped by number"
        fix = f"Map the columns by name ({named}), or delete the first line."
        raise FieldFault("header", expected, f"the column names {', '.join(cells)}", fix)


def looks_like_data(cells: Sequence[str]) -> bool:
    """Return True if the first line of a table looks like values: a cell is a number, a sentence or empty."""
    written = [cell.strip() for cell in cells]
    odd = any(not cell or NUMBER.fullmatch(cell) or SENTENCE.search(cell) for cell in written)
    return odd and not _has_column_name(written)


def txt_layout(handle: TextIO) -> Literal["header", "no header"] | None:
    """Detect a .txt file whose lines are rows of a table, with or without a header; return None for prose.

    In a table, the first lines have the same number of tabs, and the first line has no empty cell. The first
    line is a header if it has the name of a column that a format reads."""
    lines = list(itertools.islice((line for line in handle if line.strip()), COMPARED_LINES))
    if len(lines) < 2 or len({line.count("\t") for line in lines}) > 1:
        return None
    cells = [cell.strip() for cell in lines[0].split("\t")]
    if len(cells) < 2 or "" in cells:
        return None
    return "header" if _has_column_name(cells) else "no header"


def _has_column_name(cells: Sequence[str]) -> bool:
    """Return True if a format reads one of these columns.

    One-letter names count only if all names are known.
    """
    known = [cell.casefold() for cell in cells if cell.casefold() in COLUMN_NAMES]
    return len(known) == len(cells) or any(len(name) > 1 for name in known)
