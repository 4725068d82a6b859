"""Evaluation files of the recipe: one read as the training source is, or several with names."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.test_prepare import Language, run
from tunesmith.errors import DataError


def write(path, count, said="Answer"):
    rows = [{"instruction": f"Question {n}?", "output": f"{said} {n}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.jsonl", 8)


def test_sets_are_counted_together_and_each_alone(train, tmp_path):
    sets = {"some": {"path": write(tmp_path / "a.jsonl", 3, "This")}, "more": {"path": write(tmp_path / "b.jsonl", 5, "That")}}
    prepared = run(train, eval={"sets": sets})
    report = prepared.report
    assert prepared.eval_sets == ("some", "more") and np.bincount(prepared.eval.source).tolist() == [3, 5]
    assert {name: split.rows for name, split in report.eval_sets.items()} == {"some": 3, "more": 5} and report.eval.rows == 8
    assert sum(split.tokens for split in report.eval_sets.values()) == report.eval.tokens
    assert [source.role for source in report.sources] == ["train", "eval some", "eval more"]
    assert json.loads(json.dumps(report.as_dict()))["eval_sets"]["some"]["rows"] == 3
    assert any(line.startswith("eval some: 3 examples") for line in report.lines())


def test_a_set_has_settings_of_its_own(train, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("ask,reply\nwhat?,that\nwho?,she\nwhere?,there\n")
    sets = {"table": {"path": str(table), "columns": {"instruction": "ask", "output": "reply"}, "limit": 2}}
    assert run(train, eval={"sets": sets}).report.eval_sets["table"].rows == 2


def test_one_file_is_read_as_the_first_training_source_is(tmp_path):
    for name in ("train.csv", "held.csv"):
        (tmp_path / name).write_text("ask,reply\nwhat?,that\nwho?,she\n")
    source = {"path": str(tmp_path / "train.csv"), "columns": {"instruction": "ask", "output": "reply"}, "limit": 1, "weight": 3}
    prepared = run("", train=[source], eval={"path": str(tmp_path / "held.csv")})
    assert len(prepared.train) == 1 and len(prepared.eval) == 2 and prepared.eval.weights.tolist() == [1]
    assert prepared.eval_sets == () and prepared.report.eval_sets == {}


def test_a_set_without_rows_is_named(train, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"data\.eval\.sets\.none: .*empty\.jsonl has no rows. Expected at least one"):
        run(train, eval={"sets": {"none": {"path": str(empty)}}})


def test_a_set_whose_rows_are_all_bad_is_named(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "q", "output": ""}\n')
    with pytest.raises(
        DataError, match=r"no data\.eval\.sets\.bad rows: the file has none that can be used: 1 bad row:\n.*bad.jsonl:1:output"
    ):
        run(train, eval={"sets": {"good": {"path": train}, "bad": {"path": str(bad)}}}, bad_rows="skip")


def test_a_set_that_a_policy_empties_is_named(train, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"instruction": "q", "output": "long " * 200}) + "\n")
    with pytest.raises(DataError, match=r"no data\.eval\.sets\.long rows are left: all 1 are longer than max_length 60. Raise"):
        run(
            train, Language(overlong="drop"), eval={"sets": {"good": {"path": train}, "long": {"path": str(long)}}}, max_length=60
        )


def test_a_set_that_is_missing_is_named(train):
    with pytest.raises(DataError, match=r"data\.eval\.sets\.gone: data file not found"):
        run(train, eval={"sets": {"gone": {"path": "nowhere.jsonl"}}})
