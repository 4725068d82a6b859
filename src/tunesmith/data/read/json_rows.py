"""JSON rows: one object per line, or one array of objects, read through a sliding window.

``json.load`` would hold the whole file as text and as objects. The window holds one value and a chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TextIO

from tunesmith.data.formats import squad_file
from tunesmith.data.row_problems import Record, RowProblem, shorten

CHUNK = 1 << 18
"""Characters read at a time."""

LARGEST_ROW = 1 << 28
"""Characters of one row; the reader gives up on an unclosed quote after that many."""

_TEXT = r'"(?:[^"\\]|\\.)*"'
_SIMPLE = rf"(?:\s*{_TEXT}\s*:\s*(?:{_TEXT}|[\w.+-]+)\s*,)*\s*"
SQUAD = re.compile(rf'\{{{_SIMPLE}"data"\s*:\s*\[(?=\s*\{{{_SIMPLE}"paragraphs"\s*:)')
"""The beginning of a nested SQuAD file, up to the list of articles; keys of simple values may come first."""


class RepeatedKey(dict[str, object]):
    """An object in which a key occurs twice. ``json`` would keep the last value and forget the others."""

    def __init__(self, pairs: Sequence[tuple[str, object]], key: str) -> None:
        super().__init__(pairs)
        self.key = key


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object of these pairs; a RepeatedKey if a key occurs twice in it or in a nested object."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        return RepeatedKey(pairs, next(name for name in names if names.count(name) > 1))
    for value in made.values():
        if type(value) in (RepeatedKey, list) and (key := _repeated_key(value)) is not None:
            return RepeatedKey(pairs, key)
    return made


def _repeated_key(value: object) -> str | None:
    """Return the repeated key of an object, or of an object in a list."""
    if isinstance(value, RepeatedKey):
        return value.key
    if isinstance(value, list):
        return next((key for item in value if (key := _repeated_key(item)) is not None), None)
    return None


SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


class BrokenJson(Exception):
    """The text at a position is not JSON, and nothing after it can be read."""

    def __init__(self, expected: str, got: str, line: int, column: int) -> None:
        super().__init__(expected)
        self.expected, self.got, self.line, self.column = expected, got, line, column


def read_json(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """Rows of a .json file: an array, one object per line, or objects that extend over several lines."""
    window = Window(handle)
    first = window.peek()
    if first == "[":
        yield from _values(window.array(), path)
    elif first and (start := SQUAD.match(window.text, window.at)):
        window.at = start.end() - 1
        yield from _until_broken(squad_file.nested_rows(_articles(window), path), path)
    elif first and window.line_is_whole():
        yield from _lines(window.lines(), path)
    elif first:
        yield from _values(window.stream(), path)


def read_jsonl(handle: TextIO, path: str) -> Iterator[Record | RowProblem]:
    """Rows of a .jsonl file: one object per line; an array is accepted too."""
    window = Window(handle)
    first = window.peek()
    if first == "[":
        yield from _values(window.array(), path)
    elif first:
        yield from _lines(window.lines(), path)


def _articles(window: Window) -> Iterator[tuple[int, object]]:
    """Yield (line, article) of a nested SQuAD file. Raises BrokenJson."""
    for line, article in window.elements():
        if isinstance(article, RepeatedKey):
            raise BrokenJson("each key once", f"the key {article.key!r} twice in the article", line, 1)
        yield line, article


def _lines(lines: Iterator[tuple[int, str]], path: str) -> Iterator[Record | RowProblem]:
    expected = "one JSON object on the line"
    written = ((number, line) for number, line in lines if line.strip())
    for row, (number, line) in enumerate(written, 1):
        try:
            value = DECODER.decode(line)
        except json.JSONDecodeError as error:
            got = f"{error.msg} at line {number}, column {error.colno}"
            yield RowProblem(path, row, "line", expected, got, "Correct or delete the line.", number)
        except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
            yield RowProblem(path, row, "line", expected, str(error), "Delete the line.", number)
        else:
            yield _record(path, row, number, value)


def _values(values: Iterator[tuple[int, object]], path: str) -> Iterator[Record | RowProblem]:
    rows = (_record(path, row, line, value) for row, (line, value) in enumerate(values, 1))
    return _until_broken(rows, path)


def _until_broken(rows: Iterator[Record | RowProblem], path: str) -> Iterator[Record | RowProblem]:
    row = 0
    try:
        for item in rows:
            row = item.row
            yield item
    except BrokenJson as broken:
        got = f"{broken.got} at line {broken.line}, column {broken.column}"
        fix = "Correct it there; nothing after it can be read."
        yield RowProblem(path, row + 1, "json", broken.expected, got, fix, broken.line, fatal=True)


def _record(path: str, row: int, line: int, value: object) -> Record | RowProblem:
    if isinstance(value, RepeatedKey):
        fix = "Rename one of the two, or delete it."
        return RowProblem(path, row, value.key, "each key once", f"the key {value.key!r} twice", fix, line)
    if isinstance(value, dict):
        return Record(path, row, line, value)
    fix = 'Write each row as {"field": value, ...}.'
    return RowProblem(path, row, "row", "an object with named fields", shorten(value), fix, line)


class Window:
    """A part of the file, ``text``, and a position in it, ``at``. Lines and columns count from 1."""

    def __init__(self, handle: TextIO) -> None:
        self.handle = handle
        self.text = ""
        self.at = 0
        self.ended = False
        self._line = 1
        self._counted = 0  # ``_line`` is the line of this position
        self._column = 0  # columns of the first line before ``text``

    def grow(self) -> bool:
        """Drop the text before the position and read as much as is left. False at the end of the file."""
        if self.ended:
            return False
        self.line(self.at)
        before = self.text[: self.at]
        self._column = len(before) - before.rfind("\n") - 1 if "\n" in before else self._column + len(before)
        rest = self.text[self.at :]
        more = self.handle.read(max(CHUNK, len(rest)))
        self.ended = not more
        self.text, self.at, self._counted = rest + more, 0, 0
        return True

    def line(self, at: int) -> int:
        """The line of a position. Positions must be asked for in ascending order."""
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def broken(self, expected: str, got: str, at: int) -> BrokenJson:
        start = self.text.rfind("\n", 0, at)
        column = at - start if start >= 0 else self._column + at + 1
        return BrokenJson(expected, got, self.line(at), column)

    def peek(self) -> str:
        """Move to the next character that is not a space, and return it; "" at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def value(self) -> object:
        """Decode the value that begins here and move behind it. Raises BrokenJson."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Near the end of the window, or in an open string, the rest may only be unread.
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

    def array(self) -> Iterator[tuple[int, object]]:
        """(line, value) of each element of the array that begins here, and must end the file."""
        yield from self.elements()
        if self.peek():
            raise self.broken("the end of the file after ']'", "more text", self.at)

    def elements(self) -> Iterator[tuple[int, object]]:
        """(line, value) of each element of the array that begins here."""
        self.at += 1
        mark = self.peek()
        if mark == "]":
            self.at += 1
        while mark != "]":
            self.peek()
            line = self.line(self.at)
            yield line, self.value()
            mark = self.peek()
            if mark not in (",", "]"):
                got = shorten(mark) if mark else "the end of the file"
                raise self.broken("',' or ']' after a row", got, self.at)
            self.at += 1

    def stream(self) -> Iterator[tuple[int, object]]:
        """(line, value) of each of the values that follow one another."""
        while self.peek():
            line = self.line(self.at)
            yield line, self.value()

    def line_is_whole(self) -> bool:
        """True if the line that begins here is one JSON value; else an object extends over several lines."""
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
        pieces = self.text[self.at :].split("\n")
        self.text, self.at, self._counted = "", 0, 0
        if not self.ended:
            pieces[-1] += self.handle.readline().rstrip("\n")
        yield from enumerate(pieces, number)
        number += len(pieces)
        yield from enumerate((line.rstrip("\n") for line in self.handle), number)
