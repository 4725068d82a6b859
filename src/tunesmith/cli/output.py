"""What the command line prints: the result on stdout, everything else on stderr.

A verb calls ``say`` for what a person reads on the way, and ``result`` once, at the end. Under ``--json`` stdout carries
exactly one JSON object, whatever a library prints: ``only_result`` sends all else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

WIDE = 10_000
"""Columns of a table that is written to a file: no line is broken."""

_stdout: TextIO | None = None
"""The real stdout while ``only_result`` is active."""


def console() -> Console:
    """Rich console on stderr, for progress and remarks. Honours NO_COLOR."""
    return Console(stderr=True, highlight=False)


def columns() -> int:
    """How wide what ``result`` prints may be: the terminal's width, or ``WIDE`` in a file or a pipe."""
    terminal = Console()
    return terminal.width if terminal.is_terminal else WIDE


def say(*objects: Any) -> None:
    """Print strings (no markup is read from them: paths may hold brackets) or rich renderables to stderr."""
    _show(console(), objects)


def result(
    obj: Mapping[str, Any], as_json: bool = False, human: Callable[[Mapping[str, Any]], Any] | None = None
) -> None:
    """Print the result of a verb to stdout.

    With ``as_json``: one JSON object, non-finite numbers as null. Else ``human(obj)``: what it returns (a string or a rich
    renderable, or a list of them) is printed; without ``human`` each key is printed on a line of its own.
    """
    if as_json:
        stream = _stdout or sys.stdout
        stream.write(json.dumps(plain(obj), ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        return
    shown = human(obj) if human else "\n".join(f"{key}: {value}" for key, value in obj.items())
    if shown is not None:
        _show(Console(highlight=False), shown if isinstance(shown, list | tuple) else (shown,))


def fail(error: BaseException, exit_code: int, as_json: bool = False) -> int:
    """Report ``error`` on stderr, and as ``{"error": {...}}`` on stdout under --json. Returns ``exit_code``."""
    message = str(error) or type(error).__name__
    say(f"error: {message}")
    if as_json:
        result(
            {"error": {"type": type(error).__name__, "message": message, "exit_code": exit_code}},
            as_json=True,
        )
    return exit_code


@contextlib.contextmanager
def only_result() -> Iterator[None]:
    """Keep stdout for ``result``: whatever else is printed to it goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: paths as strings, tuples as lists, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _show(target: Console, objects: Any) -> None:
    for item in objects:
        # Lists of facts go into a file or a pipe a line each, so that a path can be searched for and copied.
        facts = isinstance(item, Table) and item.box is None and not target.is_terminal
        to = Console(file=target.file, highlight=False, width=WIDE) if facts else target
        to.print(item, markup=False, soft_wrap=isinstance(item, str))
