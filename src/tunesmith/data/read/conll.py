"""CoNLL files: one word per line with its tags in columns, and a blank line between sentences.

Tjong Kim Sang and De Meulder 2003 (W03-0419). A sentence is a row: ``tokens`` is the first column, ``tags``
the last. If there are more columns, each also has its number as a name ("2", "3", ...). Comments (``# text``
or ``## id``) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

from tunesmith.data.row_problems import Record, RowProblem, shorten

DOCUMENT = "-DOCSTART-"

COMMENT = re.compile(r"#+\s+\S")
"""The beginning of a comment. A word of # alone is followed by a tab."""

Line = tuple[int, str]
"""(line number, text)."""


def read_conll(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """The sentences of a file. The line of a row is the first of its sentence."""
    row = columns = 0
    tabs = False
    for lines in _sentences(handle):
        tabs = tabs or any("\t" in line for _, line in lines)
        lines = _without_comments(lines, tabs)
        if not lines:
            continue
        row += 1
        item = _row(lines, columns or len(_cells(lines[0][1])), path, row)
        if isinstance(item, Record):
            columns = columns or len(_cells(lines[0][1]))
        yield item


def _sentences(handle: TextIO) -> Iterator[list[Line]]:
    lines: list[Line] = []
    for number, line in enumerate(handle, 1):
        line = line.rstrip("\n")
        if line.strip() and _cells(line)[0] != DOCUMENT:
            lines.append((number, line))
        elif lines:
            yield lines
            lines = []
    if lines:
        yield lines


def _without_comments(lines: list[Line], tabs: bool) -> list[Line]:
    """Return the lines of a sentence without comments. ``tabs``: tabs separate the columns of the file.

    With tabs, a line that begins with ``# `` and has no tab is a comment, and so is a line before the first
    word whose first cell is a comment. With spaces, a comment comes before the first word and has another
    number of columns than the last line: ``# O`` may be a word with its tag."""
    if tabs:
        lines = [(number, line) for number, line in lines if "\t" in line or not COMMENT.match(line)]
    first = 0
    while first < len(lines) - 1 and _is_comment(lines[first][1], lines[-1][1], tabs):
        first += 1
    return lines[first:]


def _is_comment(line: str, last: str, tabs: bool) -> bool:
    if tabs:
        return COMMENT.match(line.partition("\t")[0]) is not None
    return COMMENT.match(line) is not None and len(_cells(line)) != len(_cells(last))


def _cells(line: str) -> list[str]:
    """The columns of a line. Where tabs separate them, a word may be a space."""
    if "\t" in line:
        first, *rest = line.rstrip("\r").split("\t")
        return [first.strip(" ") or first, *(cell.strip() for cell in rest)]
    return [cell for cell in line.strip(" \r").split(" ") if cell]


def _row(lines: list[Line], count: int, path: str, row: int) -> Record | RowProblem:
    """The row of a sentence, whose lines must have ``count`` columns."""
    table = [_cells(line) for _, line in lines]
    for (number, line), cells in zip(lines, table, strict=True):
        where = f"on line {number}: {shorten(line)}"
        if len(cells) != count:
            fix = "Write the same number of columns on every line, separated by a tab or by spaces, "
            fix += "and a blank line between sentences."
            got = f"{_counted(len(cells))} {where}"
            return RowProblem(path, row, "columns", _counted(count), got, fix, number)
        if "" in cells:
            column = cells.index("") + 1
            expected = "a word" if column == 1 else f"a tag in column {column}"
            return RowProblem(path, row, "columns", expected, f"nothing {where}", "Fill it in.", number)
    tokens, *tags = map(list, zip(*table, strict=True))
    value = {"tokens": tokens}
    if count > 2:
        value |= {str(column): cells for column, cells in enumerate(tags, 2)}
    if count > 1:
        value["tags"] = tags[-1]
    return Record(path, row, lines[0][0], value)


def _counted(number: int) -> str:
    return "1 column" if number == 1 else f"{number} columns"
