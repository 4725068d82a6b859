"""Turns as files write them: calls in a row, weights, nulls of column formats, parts of text, images."""

from __future__ import annotations

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.zoo import ZOO
from tunesmith.data.data_config import Source
from tunesmith.data.encode.conversations import encode
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import ROW_TYPES

SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
OTHER = {"name": "wait", "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(folder, name, content):
    """The rows of a file with this content, and its problems as text."""
    (folder / name).write_bytes(content)
    items = list(open_source(Source(path=str(folder / name)), ROW_TYPES).rows())
    return [str(item) if isinstance(item, RowProblem) else item[1] for item in items]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def turn(**keys):
    return {"role": "assistant", **keys}


def of_messages(folder, *messages, **columns):
    (row,) = read(folder, "rows.jsonl", lines({"messages": [{"role": "user", "content": "x"}, *messages], **columns}))
    return row


ASKED = {"role": "user", "content": "Weather in Oslo and in Bergen?"}
NATIVE = [
    ASKED,
    turn(content="Both.", tool_calls=[call("weather", city="Oslo"), call("weather", city="Bergen")]),
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "7"},
    turn(content="", tool_calls=[call("wait", minutes=1), call("wait", minutes=2)]),
    {"role": "tool", "content": "ok"},
    turn(content="3 and 7."),
]
SHAREGPT = [
    {"from": "human", "value": ASKED["content"]},
    {"from": "gpt", "value": "Both."},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bergen"}}'},
    {"from": "observation", "value": "3"},
    {"from": "observation", "value": "7"},
    {"from": "function_call", "value": '{"name": "wait", "arguments": {"minutes": 1}}'},
    {"from": "function_call", "value": '[{"name": "wait", "arguments": "{\\"minutes\\": 2}"}]'},
    {"from": "observation", "value": "ok"},
    {"from": "gpt", "value": "3 and 7."},
]


@pytest.mark.parametrize("options", [{}, {"train_on": "assistant"}, {"train_on": "all"}, {"expand_turns": True}])
def test_sharegpt_calls_in_a_row_train_as_the_native_turn(tmp_path, options):
    tools = [SCHEMA, OTHER]
    rows = [
        *read(tmp_path, "native.jsonl", lines({"messages": NATIVE, "tools": tools})),
        *read(tmp_path, "sharegpt.jsonl", lines({"conversations": SHAREGPT, "tools": json.dumps(tools)})),
    ]
    native, sharegpt = encode(rows, ZOO["qwen3"].tokenizer(), **options)
    assert len(native) == len(sharegpt) == (3 if "expand_turns" in options else 1)
    for one, other in zip(native, sharegpt):
        assert all((one[name] == other[name]).all() for name in ("input_ids", "supervised"))


def test_a_call_after_an_answer_to_a_tool_is_a_turn_of_its_own(tmp_path):
    row = of_messages(tmp_path, turn(tool_calls=[call("a")]), turn(content="text"), turn(content="more"))
    assert [len(message.get("tool_calls", ())) for message in row.messages] == [0, 1, 0, 0]


def test_openai_s_old_key_of_a_single_call_is_read(tmp_path):
    row = of_messages(tmp_path, turn(content=None, function_call={"name": "a", "arguments": '{"x": 1}'}))
    assert row.messages[1] == turn(content="", tool_calls=[call("a", x=1)])


TWINS = [
    {"messages": [{"role": "user", "content": "Wait."}, turn(content=None, tool_calls=[call("wait", minutes=2)])],
     "tools": [{"type": "function", "function": SCHEMA}, {"type": "function", "function": OTHER}]},
    {"messages": [ASKED, turn(content="So.", tool_calls=[call("weather", city="Oslo")], weight=0),
                  {"role": "tool", "content": "3", "name": "weather"}, turn(content="3 degrees.")],
     "tools": [{"type": "function", "function": SCHEMA}]},
    {"messages": [{"role": "user", "content": "Hi"}, turn(content="Hello.")], "tools": None},
]  # fmt: skip


def test_twins_in_every_format_train_the_same_tokens(tmp_path):
    """A column format gives every object the keys of all rows; csv holds the objects as JSON text."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWINS), tmp_path / "twin.parquet")
    assert b'"city": null' in json.dumps(pyarrow.parquet.read_table(tmp_path / "twin.parquet").to_pylist()).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, ["messages", "tools"])
    writer.writeheader()
    writer.writerows({key: json.dumps(value) if value else "" for key, value in row.items()} for row in TWINS)
    files = {
        "twin.jsonl": lines(*TWINS),
        "twin.json": json.dumps(TWINS).encode(),
        "twin.csv": text.getvalue().encode(),
        "twin.parquet": (tmp_path / "twin.parquet").read_bytes(),
    }
    rows = {name: read(tmp_path, name, content) for name, content in files.items()}
    assert all(found == rows["twin.jsonl"] for found in rows.values())
    assert "null" not in json.dumps(rows["twin.jsonl"][0].messages + rows["twin.jsonl"][0].tools)


def test_null_arguments_in_json_text_stay(tmp_path):
    """Column formats do not produce these, so the nulls in the text are kept."""
    written = {"type": "function", "function": {"name": "a", "arguments": '{"x": null}'}}
    assert of_messages(tmp_path, turn(tool_calls=[written])).messages[1]["tool_calls"] == [call("a", x=None)]


@pytest.mark.parametrize("keys", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": "false"}])
def test_a_turn_of_weight_0_is_context(tmp_path, keys):
    row = of_messages(tmp_path, turn(content="a", **keys), {"role": "user", "content": "y", **keys}, turn(content="b", loss=True))
    assert row.messages[1] == turn(content="a", weight=0)
    assert row.messages[2:] == ({"role": "user", "content": "y"}, turn(content="b"))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (turn(content="a", weight=0.5), "messages[1].weight (line 1): expected 0 or 1, true or false, got a number 0.5"),
        (turn(content=[{"type": "text", "txt": "a"}]), "expected a text under the key 'text', got the keys type, txt"),
        (turn(content=[{"type": "image_url", "image_url": "a.png"}]), "images, audio and video are not trained on"),
        (turn(content="a", images=["a.png"]), "messages[1].images (line 1): expected text only"),
    ],
)
def test_what_a_turn_cannot_hold_is_named(tmp_path, message, problem):
    assert problem in of_messages(tmp_path, message)


def test_text_and_its_calls_have_one_weight(tmp_path):
    assert "the weight of the turn before it" in of_messages(tmp_path, turn(content="a", weight=0), turn(tool_calls=[call("a")]))


def test_parts_may_call_their_text_value(tmp_path):
    assert of_messages(tmp_path, turn(content=[{"type": "text", "value": "a"}, {"text": "b"}])).messages[1]["content"] == "ab"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, turn(content="A cup.")], "images": ["a.png"]},
        {"question": "What is there?", "answer": "A cup.", "image": {"bytes": "x", "path": "a.png"}},
        {"prompt": "What is there?", "chosen": "A cup.", "rejected": "A dog.", "image": "a.png"},
    ],
)
def test_images_next_to_text_are_refused(tmp_path, record):
    (problem,) = read(tmp_path, "rows.jsonl", lines(record))
    assert "images, audio and video are not trained on" in problem and ":1:image" in problem


def test_a_column_of_images_that_is_empty_or_mapped_is_no_image(tmp_path):
    (row,) = read(tmp_path, "rows.jsonl", lines({"messages": [ASKED, turn(content="A cup.")], "images": []}))
    assert not isinstance(row, str)
    path = tmp_path / "captions.jsonl"
    path.write_bytes(lines({"image": "a red cup", "answer": "red"}))
    (item,) = open_source(Source(path=str(path), columns={"question": "image"}), ROW_TYPES).rows()
    assert isinstance(item, tuple)
