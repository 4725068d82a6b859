"""What is wrong with one row, said so that it can be mended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.errors import DataError


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that cannot be used, or (``row`` 0) a file that cannot: then ``got`` is all that is to be said.

    ``row`` counts the rows of the file from 1 (blank lines and a csv header are not rows); ``line`` is the line of the file
    where the row begins, when it has lines. ``fatal``: nothing after this row can be read either.
    """

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
        """``file:row:field``; of a whole file, its path."""
        if not self.row:
            return self.path
        return f"{self.path}:{self.row}:{self.field}"

    def __str__(self) -> str:
        if not self.row:
            return self.got
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.where}{line}: expected {self.expected}, got {self.got}. {self.fix}"

    def as_dict(self) -> dict[str, Any]:
        return {"where": self.where, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the file has it: named fields, and where it stands."""

    path: str
    row: int
    line: int | None
    value: dict[str, Any]


class RowFault(DataError):
    """A row that cannot be rendered or tokenised. ``index`` is its position in the rows that were given; ``field``, of its
    format, is what is wrong with it."""

    def __init__(self, index: int, expected: str, got: str, fix: str, field: str = "row") -> None:
        super().__init__(f"row {index}: expected {expected}, got {got}. {fix}")
        self.index, self.expected, self.got, self.fix, self.field = index, expected, got, fix, field


def shorten(value: Any, limit: int = 60) -> str:
    """``value`` as one short printable line, its kind named when it is not text."""
    kinds = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if value is None:
        return "nothing (null)"
    text = (
        repr(value[: limit + 1] if isinstance(value, str) else value)
        .encode("utf-8", "backslashreplace")
        .decode()
    )
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    kind = kinds.get(type(value))
    return f"{kind} {text}" if kind else text


def refuse(problems: Sequence[RowProblem], total: int, advice: str) -> DataError:
    """One error for ``total`` bad rows, the first ten of them listed."""
    lines = [f"  {problem}" for problem in problems[:10]]
    more = [] if total <= len(lines) else [f"  ... and {total - len(lines)} more"]
    return DataError("\n".join([f"{total} bad {'row' if total == 1 else 'rows'}:", *lines, *more, advice]))
