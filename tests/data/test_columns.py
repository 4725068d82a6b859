"""Formats: which columns become which row."""

from __future__ import annotations

import pytest

from tunesmith.data.formats.columns import choose_converter
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.data.rows import Chat, PromptCompletion, Text
from tunesmith.errors import DataError

WRITTEN = (Chat, PromptCompletion, Text)
"""Row types of supervised fine-tuning."""


def made(value, **options):
    options.setdefault("accepted", WRITTEN)
    return choose_converter([tuple(value)], path="f", **options)(Record("f", 1, 1, value))


def asked(question, answer, *before):
    return Chat((*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}))


DETECTED = [
    ({"instruction": "q", "input": "", "output": "a"}, asked("q", "a")),
    ({"instruction": "q", "input": "x", "output": "a"}, asked("q\n\nx", "a")),
    ({"Instruction": "q", "Response": "a", "Context": None}, asked("q", "a")),
    ({"instruction": "q", "output": "a", "system": "s"}, asked("q", "a", {"role": "system", "content": "s"})),
    ({"instruction": "q", "output": "a", "history": [["1", "2"]]}, asked("q", "a", *asked("1", "2").messages)),
    ({"input": "q", "output": "a"}, asked("q", "a")),
    ({"text": "q", "summary": "a"}, asked("q", "a")),
    ({"question": "q", "answer": "a"}, asked("q", "a")),
    ({"Q": "q", "A": "a", "label": "0"}, asked("q", "a")),
    ({"prompt": "q", "response": "a"}, asked("q", "a")),
    ({"question": "q", "context": "x", "answer": "a"}, asked("q\n\nx", "a")),
    ({"question": "q", "answer": "a", "system": "s"}, asked("q", "a", {"role": "system", "content": "s"})),
    ({"prompt": "q", "completion": "a", "system": "s"}, asked("q", "a", {"role": "system", "content": "s"})),
    ({"prompt": "q", "completion": "a"}, PromptCompletion("q", "a")),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, asked("q", "a")),
    ({"text": "t", "label": "1"}, Text("t")),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, asked("q", "a")),
    ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, asked("q", "a")),
    (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        asked("q", "a", {"role": "system", "content": "s"}),
    ),
]


@pytest.mark.parametrize(("value", "row"), DETECTED)
def test_formats_are_detected(value, row):
    assert made(value) == row


def test_sharegpt_calls_and_observations():
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    row = made({"conversations": turns, "tools": '[{"name": "add", "parameters": {}}]'})
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert row.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def test_openai_arguments_become_objects_and_extra_keys_stay():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
    ]
    message = made({"messages": turns}).messages[1]
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1} and message["reasoning_content"] == "hm"
    assert message["content"] == "" and call["function"]["arguments"] == '{"a": 1}'


def test_parts_of_text_are_joined():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]
    assert made({"messages": turns}).messages[0]["content"] == "ab"


def test_columns_are_mapped():
    value = {"ask": "q", "reply": "a"}
    assert made(value, columns={"instruction": "ask", "output": "reply"}) == asked("q", "a")
    assert made(value, columns={"prompt": "ask", "completion": "reply"}) == PromptCompletion("q", "a")
    assert made(value, columns={"text": "reply"}) == Text("a")


def test_a_prompt_template_fills_the_question():
    value = {"text": "long", "lang": "ko", "summary": "short"}
    assert made(value, prompt_template="{lang}: summarise {text}") == asked("ko: summarise long", "short")
    assert made({"doc": "x", "target": "y"}, columns={"output": "target"}, prompt_template="Say {doc}") == asked("Say x", "y")
    assert made({"a b": "x"}, format="text", prompt_template="<{a b}>") == Text("<x>")


def test_a_prompt_template_with_an_empty_column_is_a_problem():
    problem = made({"text": "", "summary": "s"}, prompt_template="Summarise: {text}")
    assert isinstance(problem, RowProblem) and problem.field == "text"


def test_problems_name_the_column_of_the_file():
    problem = made({"Q": "q", "A": ""})
    assert problem.where == "f:1:A"


REFUSED = [
    (dict(format="alpca"), "Did you mean `alpaca`"),
    (dict(format="sharegpt"), "needs conversations"),
    (dict(columns={"instructon": "ask"}), "Did you mean `instruction`"),
    (dict(columns={"instruction": "ask", "messages": "reply"}), "no format has all"),
    (dict(columns={"instruction": ["ask", "reply"]}), "one column, got a list .ask, reply.. Fields that take several: labels"),
    (dict(prompt_template="Say something"), "names no column"),
    (dict(prompt_template="Say {asc}"), "Did you mean `ask`"),
    (dict(format="messages", prompt_template="Say {ask}"), "prompts are turns"),
    (dict(), "ask, reply"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_columns_that_fit_no_format_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        choose_converter([("ask", "reply")], path="f", accepted=WRITTEN, **options)


def test_the_row_types_of_the_objective_select_the_format():
    with pytest.raises(DataError, match="learns from Text rows"):
        choose_converter([("question", "answer")], path="f", accepted=(Text,))
    assert choose_converter([("text", "summary")], path="f", accepted=(Text,)).form.name == "text"


def test_one_odd_row_does_not_change_the_format():
    keys = [("input", "output"), *[("instruction", "input", "output")] * 3]
    assert choose_converter(keys, path="f", accepted=WRITTEN).form.name == "alpaca"


def test_the_description_lists_used_and_unused_columns():
    maker = choose_converter([("Q", "A", "label")], path="f", accepted=WRITTEN)
    assert maker.describe(("Q", "A", "label")) == "question_answer (question <- Q, answer <- A); not used: label"
