"""What is written down of a run (``metrics.jsonl``) and what is shown of it while it goes on.

A figure that is not finite is a fact about the run. JSON has no number for it, so it is written as the string ``"nan"``,
``"inf"`` or ``"-inf"`` and read back as that float; it is never left out and never replaced by another number.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from tunesmith.errors import DataError, DiskFullError
from tunesmith.runs import figures

TIMING_KEYS = frozenset(
    ("time", "seconds", "eta_seconds", "tokens_per_second", "rows_per_second", "memory_bytes", "peak_memory_bytes")
)
"""Keys of a record that may differ between two runs of the same recipe. All others repeat exactly."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_RATE_WINDOW = 50  # records the time left is judged by: long enough to be steady, short enough to follow a change
_REDRAW_SECONDS = 0.1
_SHOWN = frozenset(
    (
        *("kind", "step", "epoch", "loss", "learning_rate", "head_learning_rate", "grad_norm", "tokens", "supervised_tokens"),
        *("eval_loss", "eval_loss_stderr", "perplexity"),
    )
)
# A note may quote a path or a row; an escape sequence in it must not reach the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Metrics:
    """The append-only file of a run's records, one JSON object per line.

    Opening it drops a last line that a kill left torn. A line reaches the operating system before ``append`` returns, so it
    outlives a kill; ``sync`` makes the lines outlive a power cut too, and is for the moment before a checkpoint is
    published, so that no checkpoint is newer than the records it continues.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = _whole(self.path.read_bytes())
            if len(whole) != self.path.stat().st_size:
                replace_file(self.path, whole)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. Raises DiskFullError when there is no room for it."""
        line = json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        with _named_disk_full(self.path), self.path.open("ab") as file:
            file.write(line.encode())

    def rewind(self, step: int) -> None:
        """Drop every line past ``step``; the file is replaced in one piece, or not at all.

        A line without a step belongs to the step of the line before it.
        """
        kept: list[bytes] = []
        at = 0
        for line, record in _lines(self.path):
            at = record.get("step", at)
            if at <= step:
                kept.append(line)
        replace_file(self.path, b"".join(kept))

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        if self.path.exists():
            with _named_disk_full(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first; none when there is no file. A torn last line is left out.

    Raises DataError when a line before the last is not a JSON object: no kill does that.
    """
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its newline, record) of every whole line."""
    if not path.exists():
        return
    # Not bytes.splitlines: only a newline ends a line here.
    for number, line in enumerate(_whole(path.read_bytes()).split(b"\n")[:-1], start=1):
        record = _parse(line)
        if record is None:
            raise DataError(
                f"{path}, line {number}: expected one JSON object, got {line[:60]!r}\n"
                f"  The file was changed by something else than tunesmith; restore it, or delete the line."
            )
        yield line + b"\n", record


def _whole(content: bytes) -> bytes:
    """``content`` without a torn last line. A last line that lost only its newline is whole, and gets it back.

    A proper prefix of a JSON object is never itself one, so what parses was written to its end.
    """
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if not last:
        return content
    return content + b"\n" if _parse(last) is not None else content[:end]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError: a cut may fall inside a character
        return None
    return _from_json(value) if isinstance(value, dict) else None


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return value


@contextmanager
def _named_disk_full(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room left to write {path}: {error.strerror}. The last checkpoint is kept.\n"
            f"  Free some space, then type the same command with --resume."
        ) from None


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` in the place of ``path``, so that a kill at any moment leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with _named_disk_full(path), beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened to be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Progress:
    """What a person sees while a run goes on.

    On a terminal one line is redrawn in place, with a bar; notes and evaluations stay above it. Anywhere else every log is
    one plain line without control characters. With ``console=None`` nothing is shown. ``notes`` collects what was said,
    for the run's manifest, whether it was shown or not.

        with Progress(Console(stderr=True)) as progress:
            progress.start(0, 480)
            progress.log({"kind": "train", "step": 1, "loss": 2.1, ...})
    """

    def __init__(
        self, console: Console | None, total_steps: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.notes: list[str] = []
        self._console = console
        # FORCE_COLOR makes rich take any file for a terminal; redrawing a line needs a real one.
        self._redraws = console is not None and console.is_interactive and console.file.isatty()
        self._live: Live | None = None
        self._line = _Line(total_steps)
        self._clock = clock
        self._drawn = -math.inf
        self._seen: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, step: int, total: int) -> None:
        """Begin to show; ``step`` is 0, or where a resumed run stands; ``total`` is the run's last step."""
        self._line.step, self._line.total = step, total
        self._seen.clear()
        self._seen.append((self._clock(), step))
        if self._redraws and self._live is None:
            # Redrawn by log() and not by a thread of rich's own, which would take time from the training.
            self._live = Live(self._line, console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start(refresh=True)

    def log(self, record: dict[str, Any]) -> None:
        """Show a ``train`` record."""
        now = self._clock()
        step = int(record.get("step", self._line.step))
        self._seen.append((now, step))
        self._line.step = step
        self._line.parts = _train_parts(record)
        self._line.left = record.get("eta_seconds", self._time_left())
        if self._live is not None:
            if now - self._drawn >= _REDRAW_SECONDS:
                self._drawn = now
                self._live.refresh()
        else:
            self._say(self._line.plain())

    def doing(self, what: str | None) -> None:
        """Say on the redrawn line what takes the time now, such as ``evaluating``; None when training goes on."""
        self._line.doing = what
        if self._live is not None:
            self._live.refresh()

    def note(self, text: str) -> None:
        """Say a line; the same line is said once only."""
        if text not in self.notes:
            self.notes.append(text)
            self._say(text)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an ``eval`` record; ``best: true`` in it marks the best yet."""
        self._say("eval  " + "  ".join([self._line.at(record.get("step")), *map(_words, _eval_parts(record))]))

    def stop(self) -> None:
        """Leave the last state on the screen and give the terminal back. May be called twice."""
        if self._live is not None:
            self._line.doing = self._line.left = None
            self._live.stop()
            self._live = None

    def _time_left(self) -> float | None:
        (first, start), (last, step) = self._seen[0], self._seen[-1]
        if self._line.total is None or step <= start:
            return None
        return max(0.0, (last - first) / (step - start) * (self._line.total - step))

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(Text(text.translate(_VISIBLE)), soft_wrap=True, highlight=False)


class _Line:
    """The state of the run on one line: bar, step, figures, time left."""

    def __init__(self, total: int | None) -> None:
        self.step = 0
        self.total = total
        self.parts: list[tuple[str, str]] = []  # (name, figure), the most important first
        self.left: float | None = None
        self.doing: str | None = None

    def at(self, step: int | None) -> str:
        total = f"/{self.total:,}" if self.total is not None else ""
        return f"step {self.step if step is None else step:,}{total}"

    def plain(self) -> str:
        return "  ".join([self.at(None), *map(_words, self.parts), *self._last()])

    def _last(self) -> list[str]:
        if self.doing is not None:
            return [f"{self.doing} ..."]
        return [f"{figures.duration(self.left)} left"] if self.left is not None else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Fit the width: the bar takes what the figures leave, and the least important figures give way first."""
        parts = list(self.parts)
        while parts and len(self._text(parts)) > options.max_width:
            parts.pop()
        text = self._text(parts)
        room = min(40, options.max_width - len(text) - 2)
        if self.total and room >= 8:
            done = round(room * min(1.0, self.step / self.total))
            full, empty = ("#", ".") if options.ascii_only else ("━", "━")
            text = Text.assemble((full * done, "green"), (empty * (room - done), "bright_black"), "  ", text)
        text.no_wrap, text.overflow = True, "crop"
        yield text

    def _text(self, parts: list[tuple[str, str]]) -> Text:
        out = Text()
        out.append(self.at(None), style="bold")
        for name, figure in parts:
            out.append("  ")
            if name:
                out.append(name + " ", style="bright_black")
            out.append(figure, style="bold red" if figure in _NOT_FINITE else "")
        for text in self._last():
            out.append("  " + text, style="cyan")
        return out


def _words(part: tuple[str, str]) -> str:
    return " ".join(part).strip()


def _train_parts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, figure) of a train record, the most important first."""
    known = (
        ("loss", "loss", figures.number),
        ("tokens_per_second", "", lambda value: f"{figures.number(round(value))} tok/s"),
        ("learning_rate", "lr", figures.rate),
        ("head_learning_rate", "head lr", figures.rate),
        ("grad_norm", "grad", figures.number),
        ("memory_bytes", "", figures.size),
        ("epoch", "epoch", lambda value: f"{value:.2f}"),
    )
    parts = [(name, form(record[key])) for key, name, form in known if figures.is_number(record.get(key))]
    return parts + _others(record)


def _eval_parts(record: dict[str, Any]) -> list[tuple[str, str]]:
    known = (
        ("epoch", "epoch", lambda value: f"{value:.2f}"),
        ("eval_loss", "loss", figures.number),
        ("eval_loss_stderr", "±", figures.number),
        ("perplexity", "perplexity", figures.number),
    )
    parts = [(name, form(record[key])) for key, name, form in known if figures.is_number(record.get(key))]
    parts += _others(record)
    if figures.is_number(record.get("seconds")):
        parts.append(("in", figures.duration(record["seconds"])))
    if record.get("best") is True:
        parts.append(("best", "so far"))
    return parts


def _others(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The objective's own figures, such as an accuracy."""
    return [
        (name, figures.number(value))
        for name, value in record.items()
        if name not in _SHOWN and name not in TIMING_KEYS and not name.endswith("_stderr") and figures.is_number(value)
    ]
