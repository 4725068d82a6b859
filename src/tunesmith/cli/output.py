"""Printing: the result on stdout, everything else on stderr.

A verb calls ``print_stderr`` for progress and remarks, and ``print_result`` once, at the end. Under
``--json`` stdout carries exactly one JSON object: ``reserve_stdout`` sends whatever libraries print to
stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.table import Table

from tunesmith import files
from tunesmith.errors import DiskError
from tunesmith.json_types import JsonObject
from tunesmith.runs.metrics_file import to_json

WIDE = 10_000
"""Width in columns of a table that is written to a file or a pipe, so that no line is broken."""

STDOUT = "standard output"
"""Its name in an error."""

Printed = RenderableType | list[RenderableType] | None
"""Strings (printed without reading markup, since a path may hold brackets) and rich renderables."""

_stdout: TextIO | None = None
"""The real stdout while ``reserve_stdout`` is active."""


def console() -> Console:
    """Return the rich console on stderr, for progress and remarks. Honours NO_COLOR."""
    return Console(stderr=True, highlight=False)


def columns() -> int:
    """Return the width for ``print_result``: that of the terminal, or ``WIDE`` in a file or a pipe."""
    terminal = Console()
    return terminal.width if terminal.is_terminal else WIDE


def print_stderr(*objects: RenderableType) -> None:
    """Print strings or rich renderables to stderr."""
    _print(console(), objects)


def print_result(
    facts: JsonObject, as_json: bool = False, human: Callable[[JsonObject], Printed] | None = None
) -> None:
    """Print the result of a verb to stdout.

    With ``as_json``: one JSON object, non-finite numbers as null. Otherwise what ``human(facts)`` returns;
    without ``human`` each key on its own line.
    """
    if as_json:
        stream = _stdout or sys.stdout
        with files.naming_full_disk(STDOUT):
            stream.write(json_line(facts))
            stream.flush()
        return
    shown = human(facts) if human else "\n".join(f"{key}: {value}" for key, value in facts.items())
    if shown is not None:
        with files.naming_full_disk(STDOUT):
            _print(Console(highlight=False), shown if isinstance(shown, list) else [shown])


def filled_columns(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table without the columns whose cells are all empty."""
    shown = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    table = Table(*(heads[place] for place in shown), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def report_error(error: BaseException, exit_code: int, as_json: bool = False) -> int:
    """Print ``error`` to stderr, under --json also ``{"error": {...}}`` to stdout. Returns ``exit_code``."""
    message = str(error) or type(error).__name__
    with contextlib.suppress(OSError):  # one of the two may be a file on a full disk
        print_stderr(f"error: {message}")
    if as_json:
        facts = {"type": type(error).__name__, "message": message, "exit_code": exit_code}
        with contextlib.suppress(OSError, DiskError):
            print_result({"error": facts}, as_json=True)
    return exit_code


def disk_error() -> DiskError | None:
    """Write out what stdout holds back; return the error of a full disk.

    Text that cannot be written is dropped: Python would try once more when it ends, and exit with 120."""
    try:
        if sys.stdout is not None:  # the shell may have closed it
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return files.disk_error(error, STDOUT)
    return None


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Reserve stdout for ``print_result``; anything else printed there goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def json_line(value: object) -> str:
    """Return ``value`` as one line of JSON, with null for non-finite numbers."""
    return json.dumps(to_json(value, lambda value: None), ensure_ascii=False, allow_nan=False) + "\n"


def _print(target: Console, objects: Iterable[RenderableType]) -> None:
    for item in objects:
        # In a file or a pipe a list of facts has one line each, so that a path can be searched for and
        # copied.
        is_facts = isinstance(item, Table) and item.box is None and not target.is_terminal
        to = Console(file=target.file, highlight=False, width=WIDE) if is_facts else target
        to.print(item, markup=False, soft_wrap=isinstance(item, str))
