"""The progress of a run on the screen: a redrawn line on a terminal, plain lines anywhere else.

The run calls ``start``, then ``log`` and ``evaluation`` with the records that it also appends to
``metrics.jsonl``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from tunesmith.runs import figure_format
from tunesmith.runs.metrics_file import NOT_FINITE, TIMING_KEYS

_RATE_WINDOW = 50
"""Records that the time left is estimated from: enough to be steady, few enough to follow a change."""

_REDRAW_SECONDS = 0.1
_BAR_FROM_WIDTH = 120
"""Columns of a terminal from which there is room for a bar next to the figures."""

_SHOWN = frozenset(
    (
        *(
            "kind",
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "head_learning_rate",
            "grad_norm",
            "tokens",
            "supervised_tokens",
        ),
        *("eval_loss", "eval_loss_stderr", "perplexity"),
    )
)
# A note may quote a path or a row; an escape sequence in it must not reach the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Field(progress.ProgressColumn):
    """A column that shows the task's field ``name``, a Text. ``whole``: the other columns give way where
    width is short.
    """

    def __init__(self, name: str, whole: bool) -> None:
        super().__init__(Column(no_wrap=whole))
        self._name = name

    def render(self, task: progress.Task) -> Text:
        text: Text = task.fields[self._name]
        return text


class Progress:
    """What a person sees while a run goes on.

    On a terminal one line is redrawn in place, with a bar; notes and evaluations stay above it. Anywhere else
    every log is one plain line without control characters. With ``console=None`` nothing is shown. ``notes``
    collects all notes, shown or not, for the run's manifest.

        with Progress(Console(stderr=True)) as progress:
            progress.start(0, 480)
            progress.log({"kind": "train", "step": 1, "loss": 2.1, ...})
    """

    def __init__(
        self,
        console: Console | None,
        total_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notes: list[str] = []
        self._console = console
        self._bar: progress.Progress | None = None
        self._clock = clock
        self._drawn = -math.inf
        self._seen: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)
        self._step, self._total = 0, total_steps
        self._parts: list[tuple[str, str]] = []  # (name, figure), the most important first
        self._left: float | None = None
        self._doing: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, step: int, total: int) -> None:
        """Begin to show; ``step`` is 0, or where a resumed run stands; ``total`` is the run's last step."""
        self._step, self._total = step, total
        self._seen.clear()
        self._seen.append((self._clock(), step))
        # FORCE_COLOR makes rich take any file for a terminal; redrawing a line needs a real one.
        if (
            self._bar is None
            and self._console
            and self._console.is_interactive
            and self._console.file.isatty()
        ):
            bar = [progress.BarColumn()] if self._console.width >= _BAR_FROM_WIDTH else []
            self._bar = progress.Progress(
                *bar,
                _Field("at", whole=True),
                _Field("figures", whole=False),
                _Field("last", whole=False),
                console=self._console,
                auto_refresh=False,  # redrawn by log(): a thread of rich's own would take time from the training
                redirect_stdout=False,
            )
            self._bar.add_task("", total=total, completed=step, **self._fields())
            self._bar.start()

    def log(self, record: dict[str, Any]) -> None:
        """Show a ``train`` record."""
        now = self._clock()
        self._step = int(record.get("step", self._step))
        self._seen.append((now, self._step))
        self._parts = _train_parts(record)
        self._left = record.get("eta_seconds", self._time_left())
        if self._bar is None:
            self._print("  ".join([self._at(self._step), *map(_words, self._parts), *self._last()]))
        elif now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._redraw(self._bar)

    def doing(self, what: str | None) -> None:
        """Show on the redrawn line what takes the time now, such as ``evaluating``; None when training goes
        on.
        """
        self._doing = what
        if self._bar is not None:
            self._redraw(self._bar)

    def note(self, text: str) -> None:
        """Print a line; the same line is printed once only."""
        if text not in self.notes:
            self.notes.append(text)
            self._print(text)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an ``eval`` record; ``best: true`` in it marks the best yet."""
        at = self._at(record.get("step", self._step))
        self._print("eval  " + "  ".join([at, *map(_words, _eval_parts(record))]))

    def stop(self) -> None:
        """Leave the last state on the screen and give the terminal back. May be called twice."""
        if self._bar is not None:
            self._doing = self._left = None
            self._redraw(self._bar)
            self._bar.stop()
            self._bar = None

    def _redraw(self, bar: progress.Progress) -> None:
        bar.update(bar.task_ids[0], completed=self._step, refresh=True, **self._fields())

    def _fields(self) -> dict[str, Any]:
        """The columns of the redrawn line, each a Text.

        Of the figures, the last and least important are cut where width is short.
        """
        shown = Text(no_wrap=True, overflow="ellipsis")
        for number, (name, figure) in enumerate(self._parts):
            shown.append("  " if number else "")
            shown.append(f"{name} " if name else "", style="bright_black")
            shown.append(figure, style="bold red" if figure in NOT_FINITE else "")
        return {
            "at": Text(self._at(self._step), style="bold"),
            "figures": shown,
            "last": Text("  ".join(self._last()), style="cyan", no_wrap=True, overflow="ellipsis"),
        }

    def _at(self, step: int) -> str:
        return f"step {step:,}/{self._total:,}" if self._total is not None else f"step {step:,}"

    def _last(self) -> list[str]:
        if self._doing is not None:
            return [f"{self._doing} ..."]
        return [f"{figure_format.duration(self._left)} left"] if self._left is not None else []

    def _time_left(self) -> float | None:
        (first, start), (last, step) = self._seen[0], self._seen[-1]
        if self._total is None or step <= start:
            return None
        return max(0.0, (last - first) / (step - start) * (self._total - step))

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(Text(text.translate(_VISIBLE)), soft_wrap=True, highlight=False)


def _words(part: tuple[str, str]) -> str:
    return " ".join(part).strip()


def _train_parts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, figure) of a train record, the most important first."""
    known = (
        ("loss", "loss", figure_format.number),
        ("tokens_per_second", "", lambda value: f"{figure_format.number(round(value))} tok/s"),
        ("learning_rate", "lr", figure_format.rate),
        ("head_learning_rate", "head lr", figure_format.rate),
        ("grad_norm", "grad", figure_format.number),
        ("memory_bytes", "", figure_format.size),
        ("epoch", "epoch", lambda value: f"{value:.2f}"),
    )
    parts = [
        (name, form(record[key])) for key, name, form in known if figure_format.is_number(record.get(key))
    ]
    return parts + _others(record)


def _eval_parts(record: dict[str, Any]) -> list[tuple[str, str]]:
    known = (
        ("epoch", "epoch", lambda value: f"{value:.2f}"),
        ("eval_loss", "loss", figure_format.number),
        ("eval_loss_stderr", "±", figure_format.number),
        ("perplexity", "perplexity", figure_format.number),
    )
    parts = [
        (name, form(record[key])) for key, name, form in known if figure_format.is_number(record.get(key))
    ]
    parts += _others(record)
    if figure_format.is_number(record.get("seconds")):
        parts.append(("in", figure_format.duration(record["seconds"])))
    if record.get("best") is True:
        parts.append(("best", "so far"))
    return parts


def _others(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The objective's own figures, such as an accuracy."""
    return [
        (name, figure_format.number(value))
        for name, value in record.items()
        if name not in _SHOWN
        and name not in TIMING_KEYS
        and not name.endswith("_stderr")
        and figure_format.is_number(value)
    ]
