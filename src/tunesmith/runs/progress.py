"""The progress of a run on the screen: a redrawn line on a terminal, plain lines anywhere else.

The run calls ``start``, then ``log`` and ``evaluation`` with the records that it also appends to
``metrics.jsonl``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import duration, is_number, number, rate, size
from tunesmith.runs.metrics_file import NOT_FINITE, TIMING_KEYS

_RATE_WINDOW = 50
"""Records for the estimate of the time left: enough to be steady, few enough to follow a change."""
_REDRAW_SECONDS = 0.1
_BAR_FROM_WIDTH = 120
"""Fewest terminal columns for a bar next to the figures."""

_NOT_OWN = frozenset((
    "kind", "step", "epoch", "loss", "learning_rate", "head_learning_rate", "grad_norm", "tokens", "supervised_tokens",
    "eval_loss", "eval_loss_stderr", "perplexity", "iteration",
))  # fmt: skip
"""Keys of a record that are not figures of the objective."""

_Form = tuple[str, str, Callable[[float], str]]
_TRAIN_FORMS: Sequence[_Form] = (
    ("loss", "loss", number),
    ("tokens_per_second", "", lambda value: f"{number(round(value))} tok/s"),
    ("learning_rate", "lr", rate),
    ("head_learning_rate", "head lr", rate),
    ("grad_norm", "grad", number),
    ("memory_bytes", "", size),
    ("epoch", "epoch", lambda value: f"{value:.2f}"),
)
"""(key, label, format) of a training record's figures, the most important first."""
_EVAL_FORMS: Sequence[_Form] = (
    ("epoch", "epoch", lambda value: f"{value:.2f}"),
    ("eval_loss", "loss", number),
    ("eval_loss_stderr", "±", number),
    ("perplexity", "perplexity", number),
)

# A note may quote a path or a row; an escape sequence in it must not reach the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Field(progress.ProgressColumn):
    """A column that shows the task's field ``name``, a Text. Columns without ``no_wrap`` shrink first."""

    def __init__(self, name: str, no_wrap: bool) -> None:
        super().__init__(Column(no_wrap=no_wrap))
        self._name = name

    def render(self, task: progress.Task) -> Text:
        text: Text = task.fields[self._name]
        return text


class Progress:
    """The progress display of a run.

    On a terminal one line is redrawn, with a bar; notes and evaluations are printed above it. Anywhere else
    every log is one plain line without control characters. With ``console=None`` nothing is shown. ``notes``
    collects all notes, shown or not, for the run's manifest.

        with Progress(Console(stderr=True)) as progress:
            progress.start(0, 480)
            progress.log({"kind": "train", "step": 1, "loss": 2.1, ...})
    """

    def __init__(self, console: Console | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.notes: list[str] = []
        self._console = console
        self._bar: progress.Progress | None = None
        self._clock = clock
        self._drawn_at = -math.inf
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)  # (time, step)
        self._step = 0
        self._total: int | None = None
        self._parts: list[tuple[str, str]] = []  # (label, figure), the most important first
        self._seconds_left: float | None = None
        self._phase: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, step: int, total: int) -> None:
        """Start the display at ``step``: 0 unless the run was resumed. ``total`` is the last step."""
        self._step, self._total = step, total
        self._recent.clear()
        self._recent.append((self._clock(), step))
        console = self._console
        # FORCE_COLOR makes rich take any file for a terminal; redrawing a line needs a real one.
        if self._bar is None and console and console.is_interactive and console.file.isatty():
            bar = [progress.BarColumn()] if console.width >= _BAR_FROM_WIDTH else []
            parts = (*bar, _Field("at", True), _Field("figures", False), _Field("last", False))
            # log() redraws: a refresh thread would take time from the training.
            self._bar = progress.Progress(*parts, console=console, auto_refresh=False, redirect_stdout=False)
            self._bar.add_task("", total=total, completed=step, **self._fields())
            self._bar.start()

    def log(self, record: JsonObject) -> None:
        """Show a ``train`` record."""
        now = self._clock()
        self._step = int(record.get("step", self._step))
        self._recent.append((now, self._step))
        self._parts = [*_format(record, _TRAIN_FORMS), *_own_figures(record)]
        self._seconds_left = record.get("eta_seconds", self._estimate_seconds_left())
        if self._bar is None:
            self._print("  ".join([self._position(self._step), *map(_join, self._parts), *self._last()]))
        elif now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            self._redraw(self._bar)

    def doing(self, phase: str | None) -> None:
        """Show what the run does now on the redrawn line, such as ``evaluating``; None for training."""
        self._phase = phase
        if self._bar is not None:
            self._redraw(self._bar)

    def note(self, text: str) -> None:
        """Print a line, unless the same line was printed before."""
        if text not in self.notes:
            self.notes.append(text)
            self._print(text)

    def rollout(self, record: JsonObject) -> None:
        """Show the record of an iteration of sampled answers."""
        parts = [*_own_figures(record), *_format(record, [("rollout_seconds", "in", duration)])]
        at = self._position(record.get("step", self._step))
        self._print(f"iteration {record.get('iteration')}  " + "  ".join([at, *map(_join, parts)]))

    def evaluation(self, record: JsonObject) -> None:
        """Show an ``eval`` record; ``best: true`` in it marks the best so far."""
        parts = [*_format(record, _EVAL_FORMS), *_own_figures(record)]
        parts += _format(record, [("seconds", "in", duration)])
        if record.get("best") is True:
            parts.append(("best", "so far"))
        at = self._position(record.get("step", self._step))
        self._print("eval  " + "  ".join([at, *map(_join, parts)]))

    def stop(self) -> None:
        """Leave the last state on the screen and release the terminal. May be called twice."""
        if self._bar is not None:
            self._phase = self._seconds_left = None
            self._redraw(self._bar)
            self._bar.stop()
            self._bar = None

    def _redraw(self, bar: progress.Progress) -> None:
        bar.update(bar.task_ids[0], completed=self._step, refresh=True, **self._fields())

    def _fields(self) -> dict[str, Any]:
        """Return the columns of the redrawn line. A narrow terminal cuts the least important figures."""
        figures = Text(no_wrap=True, overflow="ellipsis")
        for index, (label, figure) in enumerate(self._parts):
            figures.append("  " if index else "")
            figures.append(f"{label} " if label else "", style="bright_black")
            figures.append(figure, style="bold red" if figure in NOT_FINITE else "")
        return {
            "at": Text(self._position(self._step), style="bold"),
            "figures": figures,
            "last": Text("  ".join(self._last()), style="cyan", no_wrap=True, overflow="ellipsis"),
        }

    def _position(self, step: int) -> str:
        return f"step {step:,}/{self._total:,}" if self._total is not None else f"step {step:,}"

    def _last(self) -> list[str]:
        left = [f"{duration(self._seconds_left)} left"] if self._seconds_left is not None else []
        return [*left, f"{self._phase} ..."] if self._phase is not None else left

    def _estimate_seconds_left(self) -> float | None:
        (first, start), (last, step) = self._recent[0], self._recent[-1]
        if self._total is None or step <= start:
            return None
        return max(0.0, (last - first) / (step - start) * (self._total - step))

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(Text(text.translate(_VISIBLE)), soft_wrap=True, highlight=False)


def _join(part: tuple[str, str]) -> str:
    return " ".join(part).strip()


def _format(record: JsonObject, forms: Sequence[_Form]) -> list[tuple[str, str]]:
    """Return (label, figure) of each form whose key is in the record."""
    return [(label, form(record[key])) for key, label, form in forms if is_number(record.get(key))]


def _own_figures(record: JsonObject) -> list[tuple[str, str]]:
    """Return the objective's figures, such as an accuracy."""
    own = [name for name in record if name not in _NOT_OWN | TIMING_KEYS and not name.endswith("_stderr")]
    return [(name, number(record[name])) for name in own if is_number(record[name])]
