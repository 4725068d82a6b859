"""CoNLL files: a word a line with its tags in columns, a line without words between sentences.

Tjong Kim Sang and De Meulder 2003 (W03-0419). A sentence is a row: ``tokens``, the first column; ``tags``, the last; and where
there are more, each column under its number ("2", "3", ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from tunesmith.data.row_problems import Record, RowProblem, shorten

DOCUMENT = "-DOCSTART-"

Line = tuple[int, str]


def read_conll(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """The sentences of a file. ``line`` of a row is where its sentence begins."""
    row = columns = 0
    tabs = False
    for lines in _sentences(handle):
        tabs = tabs or any("\t" in line for _, line in lines)
        if tabs:  # then a line with none is no word: a comment of CoNLL-U
            lines = [item for item in lines if "\t" in item[1] or not item[1].startswith("# ")]
        if not lines:
            continue
        row += 1
        made = _row(lines, columns)
        if isinstance(made, dict):
            columns = columns or len(_cells(lines[0][1]))
            yield Record(path, row, lines[0][0], made)
        else:
            yield RowProblem(path, row, *made)


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


def _cells(line: str) -> list[str]:
    """The columns of a line. A word may be a space where tabs separate."""
    if "\t" in line:
        first, *rest = line.rstrip("\r").split("\t")
        return [first.strip(" ") or first, *(cell.strip() for cell in rest)]
    return [cell for cell in line.strip(" \r").split(" ") if cell]


def _row(lines: list[Line], columns: int) -> dict[str, Any] | tuple[str, str, str, str, int]:
    """The row of a sentence, or what is wrong with it: (field, expected, got, fix, line)."""
    cells = [_cells(line) for _, line in lines]
    expected = columns or len(cells[0])
    for (number, line), found in zip(lines, cells, strict=True):
        if len(found) != expected:
            fix = "Write as many on every line, separated by a tab or by spaces; an empty line stands between sentences."
            return (
                "columns",
                _counted(expected),
                f"{_counted(len(found))} on line {number}: {shorten(line)}",
                fix,
                number,
            )
        for place, cell in enumerate(found, 1):
            if not cell:
                what = "a word" if place == 1 else f"a tag in column {place}"
                return "columns", what, f"nothing on line {number}: {shorten(line)}", "Fill it in.", number
    table = [list(column) for column in zip(*cells, strict=True)]
    value = {"tokens": table[0]}
    if expected > 2:
        value |= {str(place): column for place, column in enumerate(table[1:], 2)}
    if expected > 1:
        value["tags"] = table[-1]
    return value


def _counted(number: int) -> str:
    return "1 column" if number == 1 else f"{number} columns"
