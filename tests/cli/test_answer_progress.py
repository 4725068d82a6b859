"""The progress of many answers: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tunesmith.cli import answer_progress
from tunesmith.cli.answer_progress import AnswerProgress
from tunesmith.models.generate.slots import Timing


class Clocked:
    """A queue and a clock: a token takes a hundredth of a second."""

    def __init__(self) -> None:
        self.timing = Timing()

    def __call__(self) -> float:
        return self.timing.decode_tokens / 100


def run(answers: int, total: int, done: int = 0) -> None:
    queue: Any = Clocked()
    with AnswerProgress(total, queue, done, queue) as progress:
        for _ in range(answers):
            queue.timing.decode_tokens += 400
            progress.add(400)


def test_a_file_gets_a_plain_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    run(6, total=20, done=4)
    assert capsys.readouterr().err.splitlines() == [
        "7/20 answers  100 tokens/s  52.0 s left",
        "10/20 answers  100 tokens/s  40.0 s left",
    ]
    run(6, total=0)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(answer_progress, "console", lambda: Console(file=screen, force_terminal=True, width=100))
    run(2, total=4)
    shown = screen.getvalue()
    assert "2/4 answers  101 tokens/s  8.0 s left" in shown or "2/4 answers  100 tokens/s  8.0 s left" in shown
    assert shown.endswith("\x1b[1A\x1b[2K"), "nothing is left of the bar"
