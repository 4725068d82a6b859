import json
import math
import sys
from pathlib import Path

import pytest
from rich.table import Table

from tunesmith.cli import output
from tunesmith.cli.main import main


def test_result_as_json_is_one_plain_object(capsys):
    output.print_result({"path": Path("a/b"), "loss": math.nan, "nested": {"t": (1, 2)}, "한": "글"}, as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == {"path": "a/b", "loss": None, "nested": {"t": [1, 2]}, "한": "글"}
    assert out.count("\n") == 1 and "글" in out


def test_only_the_result_reaches_stdout(capsys):
    with output.reserve_stdout():
        print("a library's remark")
        output.print_result({"a": 1}, as_json=True)
    caught = capsys.readouterr()
    assert json.loads(caught.out) == {"a": 1}
    assert "a library's remark" in caught.err


def test_result_for_people(capsys):
    output.print_result({"a": 1, "b": "x"})
    output.print_result({"a": 1}, human=lambda obj: ["first", f"a is {obj['a']}"])
    output.print_result({"a": 1}, human=lambda obj: None)
    assert capsys.readouterr().out == "a: 1\nb: x\nfirst\na is 1\n"


def test_stderr_reads_no_markup_and_breaks_no_line(capsys):
    text = "pip install 'tunesmith[gguf]' " + "word " * 60
    output.print_stderr(text)
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err == text + "\n"


def test_an_error_is_reported_on_both_streams(capsys):
    assert output.report_error(ValueError("wrong [x]"), 2, as_json=True) == 2
    caught = capsys.readouterr()
    assert caught.err == "error: wrong [x]\n"
    assert json.loads(caught.out) == {"error": {"type": "ValueError", "message": "wrong [x]", "exit_code": 2}}


def test_facts_in_a_pipe_keep_a_line_each(capsys):
    table = Table(show_header=False, box=None)
    table.add_row("path", "/a folder/" * 60)
    output.print_result({}, human=lambda _: table)
    assert "/a folder/" * 60 in capsys.readouterr().out


FULL = Path("/dev/full")
BUILD = ["data", "build", "docstrings", "--rows", "3", "--out", "-"]  # few rows: Python holds them back until it ends


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "words", [["--version"], ["runs", "list"], ["runs", "list", "--json"], ["show", "nothing", "--json"], BUILD], ids=" ".join
)
def test_a_result_that_a_full_disk_swallows_is_an_error(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with FULL.open("w") as stdout:  # closing it fails where text is left, as the end of the interpreter does
        monkeypatch.setattr(sys, "stdout", stdout)
        code = main(words)
    said = capsys.readouterr().err
    assert (code, "bug in tunesmith" in said) == (2 if "nothing" in words else 3, False), said
    assert said.count("standard output: No space left on device") == ("nothing" not in words), said
