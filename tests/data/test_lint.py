"""A corpus of broken files: every bad row is named, no row vanishes, nothing raises."""

from __future__ import annotations

import json

import pytest

from tests.data.broken_files import BROKEN, GOOD, lines
from tests.data.zoo import ZOO
from tunesmith.data.check.lint import lint
from tunesmith.data.data_config import Source


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def test_the_corpus_holds_forty_files():
    assert len({name for name, *_ in BROKEN}) >= 40


@pytest.mark.parametrize(("name", "content", "rows", "expected"), BROKEN, ids=[entry[0] for entry in BROKEN])
def test_each_bad_row_is_named(tmp_path, name, content, rows, expected):
    path = write(tmp_path, name, content)
    report = lint([Source(path=path)])
    (file,) = report.files
    assert file.rows == file.kept + file.rejected == rows
    assert len(report.problems) == len(expected) == file.rejected and not report.ok
    for problem, (row, field, text) in zip(report.problems, expected):
        assert problem.where.startswith(f"{path}:{row}:") and field in problem.field
        assert text in str(problem) and problem.expected and problem.fix
        str(problem).encode("utf-8")


def test_a_report_is_json(tmp_path):
    paths = [write(tmp_path, name, content) for name, content, *_ in BROKEN]
    report = lint([Source(path=path) for path in paths])
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False
    assert len(report.problems) == sum(len(entry[3]) for entry in BROKEN)


@pytest.mark.parametrize("name", ["missing.json", "empty.jsonl", "odd.xyz", "columns.csv"])
def test_an_unusable_file_is_one_problem(tmp_path, name):
    if name != "missing.json":
        write(tmp_path, name, {"empty.jsonl": b"\n\n", "columns.csv": b"foo,bar\n1,2\n"}.get(name, b"x"))
    (problem,) = lint([Source(path=str(tmp_path / name))]).problems
    assert problem.field == "file" and name in problem.got and problem.where == str(tmp_path / name)
    assert str(problem) == problem.got  # one message, which names the file itself, and no row 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nofile.json", None, "data file not found: {path}. Data files in {folder}: neg.jsonl. Check the name and the folder."),
        ("neq.jsonl", None, "data file not found: {path}. Did you mean neg.jsonl?"),
        ("no/rows.json", None, "data file not found: {path}. There is no folder {folder}/no. Check the path."),
        ("empty.json", b"", "{path} has no rows. Expected at least one, such as "),
        ("noending", b"{}", "{path}: its name has no file type. Expected one of .json, "),
        ("odd.xyz", b"{}", "{path}: unknown file type '.xyz'. Expected one of .json, "),
    ],
)  # fmt: skip
def test_the_problem_of_a_file_is_reported_once(tmp_path, name, content, said):
    write(tmp_path, "neg.jsonl", lines(GOOD))
    write(tmp_path, "notes.md", b"")
    if content is not None:
        write(tmp_path, name, content)
    (problem,) = lint([Source(path=str(tmp_path / name))]).problems
    assert str(problem).startswith(said.format(path=tmp_path / name, folder=tmp_path))


def test_duplicates_inside_and_between(tmp_path):
    other = {"instruction": "Say bye", "output": "Bye!"}
    train = write(tmp_path, "train.jsonl", lines(GOOD, other, GOOD))
    held = write(tmp_path, "eval.jsonl", lines({"question": "x", "answer": "y"}, {"question": "Say bye", "answer": "Bye!"}))
    report = lint([Source(path=train)], [Source(path=held)])
    assert [(item.where, item.same_as) for item in report.duplicates] == [(f"{train}:3", f"{train}:1")]
    assert [(item.where, item.same_as) for item in report.leaked] == [(f"{held}:2", f"{train}:2")] and not report.ok


def test_duplicates_alone_are_no_fault(tmp_path):
    assert lint([Source(path=write(tmp_path, "a.jsonl", lines(GOOD, GOOD)))]).ok


def test_with_a_tokenizer_what_the_template_refuses_is_named(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({**GOOD, "system": "Be brief."}, GOOD))
    (problem,) = lint([Source(path=path)], tokenizer=ZOO["gemma"].tokenizer()).problems
    assert problem.row == 1 and "System role not supported" in problem.got
