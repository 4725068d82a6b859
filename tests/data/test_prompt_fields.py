"""Prompts: files become rows with the other columns next to the prompt; lint and near-duplicates support them."""

from __future__ import annotations

import csv
import json

import pytest

from tunesmith.cli.main import main
from tunesmith.data.check import minhash
from tunesmith.data.check.lint import lint
from tunesmith.data.check.near_duplicates import kept_rows, near_duplicates
from tunesmith.data.data_config import Source
from tunesmith.data.formats.columns import choose_converter
from tunesmith.data.read.prompts import read_prompts
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.data.rows import ROW_TYPES, Chat, Prompt, PromptCompletion, digest, group_key
from tunesmith.errors import DataError

Q, A, S = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
GAVE = {"role": "tool", "content": "7"}


def made(value, accepted=(Prompt,), **options):
    return choose_converter([tuple(value)], path="f", accepted=accepted, **options)(Record("f", 1, 1, value))


def file(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


SHAPES = [
    ({"prompt": "q"}, Prompt("q")),
    ({"prompt": "q", "answer": "42", "level": 3}, Prompt("q", {"answer": "42", "level": 3})),
    ({"prompt": "q", "system": "s", "answer": ["1", "2"]}, Prompt((S, Q), {"answer": ["1", "2"]})),
    ({"prompt": [S, Q], "meta": {"a": [1, {"b": None, "c": True}]}}, Prompt((S, Q), {"meta": {"a": [1, {"c": True}]}})),
    ({"prompt": json.dumps([Q])}, Prompt((Q,))),
    ({"prompt": "\n\nHuman: q\n\nAssistant:"}, Prompt((Q,))),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, Prompt("q", {"chosen": "a", "rejected": "b"})),
    ({"messages": [S, Q], "id": 7}, Prompt((S, Q), {"id": 7})),
    ({"messages": [Q, A, Q]}, Prompt((Q, A, Q))),
    ({"messages": [Q, A]}, Prompt((Q,), {"answer": "a"})),
    ({"messages": [Q, A], "answer": "42"}, Prompt((Q,), {"answer": "42"})),
    ({"messages": [Q, CALL, GAVE, A]}, Prompt((Q, CALL, GAVE), {"answer": "a"})),
    ({"conversations": [{"from": "human", "value": "q"}]}, Prompt((Q,))),
    ({"instruction": "q", "input": "", "output": "a"}, Prompt((Q,), {"output": "a"})),
    ({"instruction": "q", "input": "x", "system": "s"}, Prompt((S, {"role": "user", "content": "q\n\nx"}))),
    ({"instruction": "q", "history": [["q", "a"]]}, Prompt((Q, A, Q))),
    ({"question": "q", "answer": "#### 7"}, Prompt((Q,), {"answer": "#### 7"})),
    ({"question": "q", "context": "c"}, Prompt(({"role": "user", "content": "q\n\nc"},))),
    ({"input": "q", "output": "a"}, Prompt((Q,), {"output": "a"})),
    ({"질문": "물음", "정답": "셋"}, Prompt(({"role": "user", "content": "물음"},), {"정답": "셋"})),
    ({"prompt": "q", "answer": "x\r\ny", "empty": None, "nan": float("nan")}, Prompt("q", {"answer": "x\ny"})),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row"), SHAPES)
def test_each_shape_is_a_prompt(value, row):
    assert made(value) == row


def test_a_mapping_and_a_template_make_prompts():
    value = {"ask": "q", "text": "t", "gold": "g"}
    assert made(value, columns={"prompt": "ask"}) == Prompt("q", {"text": "t", "gold": "g"})
    assert made(value, prompt_template="Summarise: {text}") == Prompt("Summarise: t", value)
    assert made({"prompt": "q", "tools": [{"name": "f"}]}).tools == ({"type": "function", "function": {"name": "f"}},)


REFUSED = [
    ({"prompt": ""}, "prompt", "text", "empty text"),
    ({"prompt": "  \n"}, "prompt", "text", "only spaces"),
    ({"prompt": None}, "prompt", "text", "nothing"),
    ({"prompt": [Q, A]}, "prompt", "ends with a turn of the user", "assistant"),
    ({"prompt": []}, "prompt", "a list of turns", "an empty list"),
    ({"messages": [S]}, "messages", "a turn of the user", "system"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "text", "empty"),
    ({"instruction": " "}, "instruction", "text", "only spaces"),
    ({"prompt": "q", "image": "x.png"}, "image", "text only", "x.png"),
    ({"prompt": "q", "answer": "a\0"}, "answer", "text without NUL", "a NUL"),
    ({"prompt": "q", "meta": {"n": ["\ud800"]}}, "meta.n[0]", "Unicode text", "half a surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "field", "expected", "got"), REFUSED)
def test_a_row_that_is_no_prompt_is_refused(value, field, expected, got):
    problem = made(value)
    assert isinstance(problem, RowProblem), problem
    assert problem.field == field and expected in problem.expected and got in problem.got and problem.fix


def test_the_same_rows_as_jsonl_json_csv_and_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "하나", "answer": "1", "more": "a\nb"}, {"prompt": "q, 2", "answer": "2", "more": None}]
    file(tmp_path, [rows[0], {"prompt": "q, 2", "answer": "2"}])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = {}
    for name in ("jsonl", "json", "csv", "parquet"):
        opened = open_source(Source(path=str(tmp_path / f"rows.{name}")), (Prompt,))
        read[name] = [item[1] for item in opened.rows()]
    expected = [Prompt("하나", {"answer": "1", "more": "a\nb"}), Prompt("q, 2", {"answer": "2"})]
    assert read["jsonl"] == read["json"] == read["parquet"] == expected
    expected[1].columns["more"] = ""  # an empty cell of a csv file is an empty text
    assert read["csv"] == expected


def test_dates_decimals_and_bytes_of_a_parquet_file_become_json(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import datetime
    import decimal

    from pyarrow import parquet

    row = {"prompt": "q", "day": datetime.date(2024, 5, 1), "cost": decimal.Decimal("1.50"), "raw": b"x", "n": [1.5, 2.0]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    ((_, made_row),) = open_source(Source(path=str(tmp_path / "a.parquet")), (Prompt,)).rows()
    assert made_row.columns == {"day": "2024-05-01", "cost": "1.50", "n": [1.5, 2.0]}


def test_the_error_for_a_file_of_prompts_under_sft_names_the_missing_column(tmp_path):
    path = file(tmp_path, [{"prompt": "q", "reply": "a"}])
    with pytest.raises(DataError, match="completion: reply"):
        open_source(Source(path=path), (Chat, PromptCompletion))
    with pytest.raises(DataError, match="objective: grpo or ppo"):
        open_source(Source(path=path, format="prompt"), (Chat, PromptCompletion))


def test_a_file_without_prompts_is_refused_with_a_mapping(tmp_path):
    with pytest.raises(DataError, match=r"columns: \{prompt: user_query\}"):
        open_source(Source(path=file(tmp_path, [{"user_query": "q", "level": 1}])), (Prompt,))


def test_the_description_lists_the_columns_for_rewards(tmp_path):
    opened = open_source(Source(path=file(tmp_path, [{"prompt": "q", "answer": "a", "level": 1}])), (Prompt,))
    assert opened.description == "prompt (prompt); columns for rewards: answer, level"


def test_other_formats_stay_what_they_were():
    for value in ({"prompt": "q", "completion": "a"}, {"messages": [Q, A]}, {"instruction": "q", "output": "a"}):
        assert not isinstance(made(value, ROW_TYPES), Prompt)
    assert made({"prompt": "q", "level": 1}, ROW_TYPES) == Prompt("q", {"level": 1})


def test_rows_with_one_prompt_are_one_group_and_differ_by_their_columns():
    one, two = Prompt((Q,), {"answer": "1"}), Prompt((Q,), {"answer": "2"})
    assert group_key(one) == group_key(two) and digest(one) != digest(two)
    assert minhash.row_text(Prompt((S, Q), {"answer": "1"})) == "q"


def test_lint_finds_empty_and_repeated_prompts(tmp_path):
    rows = [{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": "1"}, {"prompt": " ", "answer": "2"}]
    report = lint([Source(path=file(tmp_path, rows))])
    assert [problem.where.rsplit("/")[-1] for problem in report.problems] == ["rows.jsonl:3:prompt"]
    assert [item.where.rsplit("/")[-1] for item in report.duplicates] == ["rows.jsonl:2"]
    assert main(["data", "lint", file(tmp_path, rows)]) == 2


def test_near_duplicates_compare_the_prompt_alone(tmp_path):
    pytest.importorskip("rensa")
    text = "Write a poem about the sea and the moon over it, with four lines and no rhyme at all."
    rows = [{"prompt": text, "answer": "1"}, {"prompt": text + "!", "answer": "completely different text"}, {"prompt": "Hello"}]
    sources = [Source(path=file(tmp_path, rows))]
    kept = list(kept_rows(sources, near_duplicates(sources, accepted=(Prompt,)), (Prompt,)))
    assert kept == [rows[0], rows[2]]


def test_generation_reads_prompts_as_the_training_of_a_policy_did(tmp_path):
    source = Source(path=file(tmp_path, [{"prompt": "q", "completion": "a"}]))
    (asked,), _ = read_prompts(source, ["Prompt"])
    assert asked.prompt == "q"  # the tokenizer's template decides
    (asked,), _ = read_prompts(source, ["PromptCompletion"])
    assert not isinstance(asked.prompt, str)
    (asked,), _ = read_prompts(Source(path=file(tmp_path, [{"question": "q"}])), ["Prompt"])
    assert asked.prompt == Chat((Q,)) and asked.reference is None
