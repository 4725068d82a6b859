"""The progress of a queue of prompts: answers, tokens per second, and the time left; or counts by what is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tunesmith.cli.output import console, print_stderr
from tunesmith.runs.figure_format import duration

if TYPE_CHECKING:
    from tunesmith.evaluate.answer_prompts import Queue

EVERY_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


class AnswerProgress:
    """Shows the progress of ``queue`` up to ``total`` answers, of which ``done`` are there; 0 shows nothing.

    A terminal shows a bar that is redrawn; anything else gets a plain line every ``EVERY_SECONDS``.
    """

    def __init__(
        self, total: int, queue: Queue, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.queue, self.done = total, queue, done
        self.answers = 0
        self.tokens = 0
        """Answers and tokens of this command."""
        self._clock = clock
        self._began = self._printed = clock()
        self._bar: Progress | None = None
        screen = console()
        if total and screen.is_interactive and screen.file.isatty():
            self._bar = Progress(
                BarColumn(), _Line(self), console=screen, transient=True, refresh_per_second=4
            )
            self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> AnswerProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, tokens: int) -> None:
        """Count an answer of ``tokens`` tokens."""
        self.answers, self.tokens = self.answers + 1, self.tokens + tokens
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
        elif self.total and self._clock() - self._printed >= EVERY_SECONDS:
            self._printed = self._clock()
            print_stderr(self.line())

    def line(self) -> str:
        """``120/10,000 answers  312 tokens/s  4:10 left``"""
        there, seconds = self.done + self.answers, self._clock() - self._began
        parts = [f"{there:,}/{self.total:,} answers"]
        if seconds > 0 and (made := self.queue.timing.decode_tokens + self.answers):
            parts.append(f"{made / seconds:,.0f} tokens/s")
        if self.answers:
            parts.append(f"{duration(seconds / self.answers * (self.total - there))} left")
        return "  ".join(parts)


class _Line(ProgressColumn):
    def __init__(self, progress: AnswerProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.line())


@contextmanager
def counts() -> Iterator[Callable[[str, int], None]]:
    """Yield a function (what is done, how many were done just now) that shows a count with the time for each."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, count: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None)
            progress.advance(tasks[what], count)

        yield report
