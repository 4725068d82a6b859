import json
import math
from pathlib import Path

from rich.table import Table

from tunesmith.cli import output


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
