import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.runs import EVAL, TRAIN
from tunesmith.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain(**options):
    out = io.StringIO()
    return out, Progress(Console(file=out, **options), clock=Clock())


def redrawn(out):
    """The line as it was drawn last."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).rstrip("\n").rpartition("\r")[2]


def controls(text):
    return [character for character in text if ord(character) < 32 and character != "\n"]


def test_one_plain_line_per_log_where_there_is_no_terminal():
    out, progress = plain(width=40)
    with progress:
        progress.start(0, 480)
        progress.log(TRAIN)
        progress.doing("evaluating")
        progress.doing(None)
        progress.evaluation({**EVAL, "best": True})
    assert out.getvalue().splitlines() == [
        "step 3/480  loss 1.842  680 tok/s  lr 1.6e-4  grad 0.9171  1.92 GB  epoch 0.25  0.0 s left",
        "eval  step 3/480  epoch 0.25  loss 1.801  perplexity 6.056  in 12.3 s  best so far",
    ]


def test_no_control_characters_even_when_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out, progress = plain()
    with progress:
        progress.start(0, 10)
        progress.log(TRAIN)
        progress.note("[bold]a note[/bold]")
    assert controls(out.getvalue()) == []
    assert "[bold]a note[/bold]" in out.getvalue()


def test_an_escape_sequence_in_a_note_is_shown_and_not_obeyed():
    out, progress = plain()
    progress.note("file \x1b[2Jevil\r.json\x9b1m")
    assert out.getvalue() == "file \\x1b[2Jevil\\x0d.json\\x9b1m\n"


def test_a_note_is_printed_once_and_collected():
    out, progress = plain()
    for text in ("padded batches", "other", "padded batches"):
        progress.note(text)
    assert out.getvalue() == "padded batches\nother\n"
    assert progress.notes == ["padded batches", "other"]


def test_without_a_console_notes_are_collected_and_not_printed(capfd):
    with Progress(None) as progress:
        progress.start(0, 10)
        progress.log(TRAIN)
        progress.evaluation(EVAL)
        progress.note("kept")
    assert capfd.readouterr() == ("", "")
    assert progress.notes == ["kept"]


def test_time_left_follows_the_recent_pace():
    out, progress = plain()
    progress.start(100, 1000)  # a resumed run: the steps before were not made now
    for step in range(101, 300):
        progress._clock.now += 10 if step <= 200 else 2
        progress.log({"step": step})
    assert out.getvalue().splitlines()[0].endswith("2:29:50 left")  # 899 steps of 10 s
    assert out.getvalue().splitlines()[-1].endswith("23:22 left")  # 701 steps of 2 s


def test_what_is_not_finite_is_shown():
    out, progress = plain()
    progress.log({"step": 7, "loss": math.nan, "grad_norm": math.inf})
    assert out.getvalue() == "step 7  loss nan  grad inf\n"


def test_the_objectives_own_figures_are_shown():
    out, progress = plain()
    progress.evaluation({"kind": "eval", "step": 5, "eval_loss": 0.5, "accuracy": 0.75, "peak_memory_bytes": 10})
    assert out.getvalue() == "eval  step 5  loss 0.5  accuracy 0.75\n"


@pytest.mark.parametrize("width", [20, 40, 80, 130, 200])
def test_the_redrawn_line_fits_any_width(width):
    out = Terminal()
    clock = Clock()
    console = Console(file=out, force_terminal=True, width=width, color_system=None, _environ={"TERM": "xterm"})
    with Progress(console, clock=clock) as progress:
        progress.start(0, 480)
        clock.now = 1.0
        progress.log({**TRAIN, "step": 120, "eta_seconds": 187.0})
        shown = redrawn(out)
    assert cell_len(shown) <= width
    assert "step 120/480" in shown
    assert ("1.92 GB" in shown) == (width >= 80)
    assert ("3:07 left" in shown) == (width >= 40)
    assert ("━━━━" in shown) == (width >= 130)


def test_the_redrawn_line_names_the_phase_until_training_goes_on():
    out = Terminal()
    with Progress(Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})) as progress:
        progress.start(0, 480)
        for phase in ("evaluating", "saving"):
            progress.doing(phase)
            assert f"{phase} ..." in redrawn(out)
        progress.doing(None)
        assert "..." not in redrawn(out)


def test_a_phase_of_an_iteration_stands_next_to_the_time_left():
    out, clock = Terminal(), Clock()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(console, clock=clock) as progress:
        progress.start(0, 480)
        clock.now = 1.0
        progress.log({"step": 120, "eta_seconds": 187.0})
        progress.doing("iteration 2 of 10: update")
        assert redrawn(out).split("  ")[-2:] == ["3:07 left", "iteration 2 of 10: update ..."]


def test_a_terminal_gets_one_line_redrawn_and_notes_above_it():
    out = Terminal()
    clock = Clock()
    with Progress(Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"}), clock=clock) as progress:
        progress.start(0, 480)
        for step in range(1, 4):
            clock.now += 1
            progress.log({**TRAIN, "step": step})
        progress.note("said above")
    text = out.getvalue()
    assert "said above" in text
    assert "\x1b[?25l" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is given back"


def test_the_line_is_not_redrawn_more_often_than_an_eye_can_follow():
    out = Terminal()
    clock = Clock()
    with Progress(Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"}), clock=clock) as progress:
        progress.start(0, 100_000)
        clock.now = 1.0
        for step in range(1, 1000):
            progress.log({"step": step})
        assert len(out.getvalue()) < 3000
    assert "step 999/100,000" in out.getvalue(), "the last state is left on the screen"


def test_an_error_within_gives_the_terminal_back():
    out = Terminal()
    with pytest.raises(ValueError, match="stop"), Progress(Console(file=out, force_terminal=True, width=80)) as progress:
        progress.start(0, 10)
        raise ValueError("stop")
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is given back"
