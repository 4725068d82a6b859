"""A problem of one row: where it is, what was expected, what was found, how to correct it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that cannot be used. With ``row`` 0: a file that cannot be used, and ``got`` is the whole
    message.

    ``row`` counts from 1, without blank lines and a csv header. ``line``: where the row begins in the file,
    if it has lines. ``fatal``: nothing after this row can be read."""

    path: str
    row: int
    field: str
    expected: str
    got: str
    fix: str
    line: int | None = None
    fatal: bool = False

    @property
    def where(self) -> str:
        """``file:row:field``, or the path alone for a problem of the whole file."""
        return f"{self.path}:{self.row}:{self.field}" if self.row else self.path

    def __str__(self) -> str:
        if not self.row:
            return self.got
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.where}{line}: expected {self.expected}, got {self.got}. {self.fix}"

    def as_dict(self) -> JsonObject:
        return {"where": self.where, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file has it: column -> value, and the position of the row.

    ``group``: rows of the same group are held out together; None = rows of the same prompt are.
    """

    path: str
    row: int
    line: int | None
    value: JsonObject
    group: int | None = None

    def problem(self, field: str, expected: str, got: str, fix: str) -> RowProblem:
        """A problem of this row."""
        return RowProblem(self.path, self.row, field, expected, got, fix, self.line)


class RowFault(DataError):
    """A row that cannot be rendered or tokenised: its ``index`` in the rows passed, and the wrong ``field``."""

    def __init__(self, index: int, expected: str, got: str, fix: str, field: str = "row") -> None:
        super().__init__(f"row {index}: expected {expected}, got {got}. {fix}")
        self.index, self.expected, self.got, self.fix, self.field = index, expected, got, fix, field


KINDS = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def shorten(value: object, limit: int = 60) -> str:
    """``value`` on one line of at most ``limit`` characters, after the name of its type if it is not text."""
    if value is None:
        return "nothing (null)"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    text = text.encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    kind = KINDS.get(type(value))
    return f"{kind} {text}" if kind else text


VARYING = re.compile(r"""'[^']*'|"[^"]*"|\d+""")
"""Parts of a message that differ between rows with the same cause."""

LISTED = 5
"""Further row numbers that a message lists."""


def describe_causes(problems: Sequence[RowProblem]) -> list[str]:
    """Return one message for each cause: its first row, the number of other rows, and the first of these."""
    causes: dict[tuple[str, ...], list[RowProblem]] = {}
    for problem in problems:
        kind = VARYING.sub("#", problem.expected if problem.row else problem.got)
        causes.setdefault((problem.path, VARYING.sub("#", problem.field), kind), []).append(problem)
    lines = []
    for first, *others in causes.values():
        rows = ", ".join(str(problem.row) for problem in others[:LISTED])
        rows += ", ..." if len(others) > LISTED else "."
        noun = "row" if len(others) == 1 else "rows"
        lines.append(f"{first}" + (f" The same in {len(others)} more {noun}: {rows}" if others else ""))
    return lines


def bad_rows_error(problems: Sequence[RowProblem], total: int, advice: str) -> DataError:
    """One error for ``total`` bad rows. It lists the first ten of ``problems``, each cause once."""
    lines = [f"  {line}" for line in describe_causes(problems[:10])]
    more = [] if total <= len(problems[:10]) else [f"  ... and {total - len(problems[:10])} more bad rows"]
    return DataError("\n".join([f"{total} bad {'row' if total == 1 else 'rows'}:", *lines, *more, advice]))
