"""JSON rows: one object per line, or one array of objects, read through a sliding window.

``json.load`` would hold the whole file, as text and as objects; the window holds one value and a chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from tunesmith.data.formats import squad_file
from tunesmith.data.row_problems import Record, RowProblem, shorten

CHUNK = 1 << 18
"""Characters read at a time."""

LARGEST_ROW = 1 << 28
"""Characters of one row; a quote that is never closed ends here."""

_TEXT = r'"(?:[^"\\]|\\.)*"'
_PLAIN = rf"(?:\s*{_TEXT}\s*:\s*(?:{_TEXT}|[\w.+-]+)\s*,)*\s*"
SQUAD = re.compile(rf'\{{{_PLAIN}"data"\s*:\s*\[(?=\s*\{{{_PLAIN}"paragraphs"\s*:)')
"""How the nested files of SQuAD begin, up to the list of articles."""

SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class Broken(Exception):
    """The text at a place is not JSON, and what follows cannot be made out."""

    def __init__(self, expected: str, got: str, line: int, column: int) -> None:
        super().__init__(expected)
        self.expected, self.got, self.line, self.column = expected, got, line, column


def read_json(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """Rows of a .json file: an array, one object per line, or objects spread over lines one after another."""
    window = Window(handle)
    first = window.peek()
    if first == "[":
        yield from _values(window.array(), path)
    elif first and (start := SQUAD.match(window.text, window.at)):
        window.at = start.end() - 1
        yield from _until_broken(squad_file.nested(window.elements(), path), path)
    elif first and window.line_is_whole():
        yield from _lines(window.lines(), path)
    elif first:
        yield from _values(window.stream(), path)


def read_jsonl(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """Rows of a .jsonl file: one object per line, or an array for all that."""
    window = Window(handle)
    first = window.peek()
    if first == "[":
        yield from _values(window.array(), path)
    elif first:
        yield from _lines(window.lines(), path)


def _lines(lines: Iterator[tuple[int, str]], path: str) -> Iterator[Record | RowProblem]:
    row = 0
    for number, line in lines:
        if not line.strip():
            continue
        row += 1
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            got = f"{error.msg} at line {number}, column {error.colno}"
            yield RowProblem(
                path, row, "line", "one JSON object on the line", got, "Mend or delete the line.", number
            )
        except (
            RecursionError,
            ValueError,
        ) as error:  # nested a thousand deep; a number of thousands of digits
            yield RowProblem(
                path, row, "line", "one JSON object on the line", str(error), "Delete the line.", number
            )
        else:
            yield _record(path, row, number, value)


def _values(values: Iterator[tuple[int, Any]], path: str) -> Iterator[Record | RowProblem]:
    return _until_broken(
        (_record(path, row, line, value) for row, (line, value) in enumerate(values, 1)), path
    )


def _until_broken(rows: Iterator[Record | RowProblem], path: str) -> Iterator[Record | RowProblem]:
    row = 0
    try:
        for item in rows:
            row = item.row
            yield item
    except Broken as broken:
        got = f"{broken.got} at line {broken.line}, column {broken.column}"
        fix = "Mend it there; nothing after it can be read."
        yield RowProblem(path, row + 1, "json", broken.expected, got, fix, broken.line, fatal=True)


def _record(path: str, row: int, line: int, value: Any) -> Record | RowProblem:
    if isinstance(value, dict):
        return Record(path, row, line, value)
    fix = 'Write each row as {"field": value, ...}.'
    return RowProblem(path, row, "row", "an object with named fields", shorten(value), fix, line)


class Window:
    """A stretch of the file and a place in it. Lines and columns count from 1."""

    def __init__(self, handle: TextIO) -> None:
        self.handle = handle
        self.text = ""
        self.at = 0
        self.ended = False
        self._line, self._counted, self._column = (
            1,
            0,
            0,
        )  # lines up to _counted; columns of its line before self.text

    def grow(self) -> bool:
        """Forget what was read and fetch as much again as is held; False when the file has no more."""
        if self.ended:
            return False
        self.line(self.at)
        gone = self.text[: self.at]
        self._column = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._column + len(gone)
        rest = self.text[self.at :]
        more = self.handle.read(max(CHUNK, len(rest)))
        self.ended = not more
        self.text, self.at, self._counted = rest + more, 0, 0
        return True

    def line(self, at: int) -> int:
        """The line of a place that is not before the last one asked for."""
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def broken(self, expected: str, got: str, at: int) -> Broken:
        start = self.text.rfind("\n", 0, at)
        column = at - start if start >= 0 else self._column + at + 1
        return Broken(expected, got, self.line(at), column)

    def peek(self) -> str:
        """The next character that is not a space, or "" at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def value(self) -> Any:
        """Decode the value that begins here and step behind it. Raises Broken."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Near the end of the window, or in an open string, it may only be that the rest was not read yet.
                unfinished = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if unfinished and len(self.text) - self.at < LARGEST_ROW and self.grow():
                    continue
                raise self.broken("valid JSON", error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise self.broken("JSON of plain rows", str(error), self.at) from None
            if end == len(self.text) and self.grow():  # 12 may be the beginning of 123
                continue
            self.at = end
            return value

    def array(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of each element of the array that begins here, and is all that the file holds."""
        yield from self.elements()
        if self.peek():
            raise self.broken("the end of the file after ']'", "more text", self.at)

    def elements(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of each element of the array that begins here."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
        else:
            while True:
                self.peek()
                line = self.line(self.at)
                yield line, self.value()
                mark = self.peek()
                if mark not in (",", "]"):
                    raise self.broken(
                        "',' or ']' after a row", shorten(mark) if mark else "the end of the file", self.at
                    )
                self.at += 1
                if mark == "]":
                    break

    def stream(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of each of the values that follow one another."""
        while self.peek():
            line = self.line(self.at)
            yield line, self.value()

    def line_is_whole(self) -> bool:
        """Whether the line that begins here is one JSON value (else an object is spread over several lines)."""
        while self.text.find("\n", self.at) < 0 and len(self.text) - self.at < LARGEST_ROW and self.grow():
            pass
        try:
            json.loads(self.text[self.at :].partition("\n")[0])
        except (RecursionError, ValueError):
            return False
        return True

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number, text) from here to the end of the file."""
        number = self.line(self.at)
        rest = self.text[self.at :]
        self.text, self.at, self._counted = "", 0, 0
        pieces = rest.split("\n")
        if not self.ended:
            pieces[-1] += self.handle.readline().rstrip("\n")
        yield from enumerate(pieces, number)
        number += len(pieces)
        yield from enumerate((line.rstrip("\n") for line in self.handle), number)
