"""A list or a mapping where text is expected is refused with its row, whichever file holds it; a part of it is named."""

from __future__ import annotations

import csv
import json

import pytest

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import ROW_TYPES, Chat, PromptCompletion

LISTS = [["Mina", "M. Park"], ["Busan"], ["in 1994"]]
MAPPINGS = [{"text": [one[0]], "answer_start": [3]} for one in LISTS]
FIELDS = [
    ("prompt", "completion"), ("completion", "prompt"), ("instruction", "output"), ("output", "instruction"), ("question", "answer"),
    ("text", "summary"), ("chosen", "rejected"), ("text", "label"),
]  # fmt: skip
"""The column with a list or a mapping, and another column."""


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)  # Python's text of a list, as pandas writes it
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, **given):
    return list(open_source(Source(path=str(path), **given), (Chat, PromptCompletion, *ROW_TYPES)).rows())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("values", [LISTS, MAPPINGS], ids=["lists", "mappings"])
@pytest.mark.parametrize(("name", "other"), FIELDS)
def test_it_is_refused_by_row_and_field(name, other, values, kind, tmp_path):
    more = {"prompt": "which one?"} if name == "chosen" else {}
    path = write(tmp_path, kind, [{name: value, other: f"other {n}", **more} for n, value in enumerate(values)])
    problems = read(path)
    assert len(problems) == len(values) and all(isinstance(one, RowProblem) for one in problems)
    assert [(one.row, one.field.partition("[")[0]) for one in problems] == [(n, name) for n in (1, 2, 3)]
    assert all(one.got.startswith("a list: " if values is LISTS else "a mapping: ") for one in problems)
    assert all("COLUMN.0" in one.fix and "columns: {" in one.fix for one in problems)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("values", "place"), [(LISTS, "answers.0"), (MAPPINGS, "answers.text.0")])
def test_what_the_error_names_reads_the_part(values, place, kind, tmp_path):
    path = write(tmp_path, kind, [{"prompt": f"q {n}", "answers": value} for n, value in enumerate(values)])
    rows = [row for _, row in read(path, columns={"prompt": "prompt", "completion": place})]
    assert rows == [PromptCompletion(f"q {n}", one[0]) for n, one in enumerate(LISTS)]


@pytest.mark.parametrize("answer", ['["Mina"]', '{"name": "Mina"}', "[1, 2]", "['a', 'b']"])
def test_an_answer_that_is_json_or_one_list_among_texts_stays(answer, tmp_path):
    answers = [answer, "plain text"] if answer.startswith("['") else [answer, answer]
    path = write(tmp_path, "csv", [{"prompt": "q", "completion": one} for one in answers])
    assert [row for _, row in read(path)] == [PromptCompletion("q", one) for one in answers]


def test_turns_that_pandas_wrote_are_turns(tmp_path):
    turns = [[{"role": "user", "content": "it's"}], [{"role": "assistant", "content": "a"}]]
    path = write(tmp_path, "csv", [{"prompt": turns[0], "completion": turns[1]}])
    assert [row for _, row in read(path)] == [Chat((*turns[0], *turns[1]))]
