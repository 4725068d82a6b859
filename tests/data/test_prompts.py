"""A prompt read for generation is what training had before the answer, whatever the format, and keeps its answer."""

import json

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from tunesmith.data.data_config import Source
from tunesmith.data.encode import conversations
from tunesmith.data.encode.templates import CHATML
from tunesmith.data.read.prompts import read_prompts
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import Chat, PromptCompletion, Ranking, Text
from tunesmith.errors import DataError

TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "stock", "arguments": "{}"}}]}
ASKED = [{"role": "user", "content": "how many?"}, CALL, {"role": "tool", "content": "3"}]
ROWS = {
    "instruction and context": {"instruction": "name the day", "context": "it was Monday", "response": "Monday"},
    "system and history": {
        "system": "shout",
        "instruction": "say yes",
        "input": "",
        "output": "YES",
        "history": [["a", "B"]],
    },
    "summary": {"document": "the barn is red", "summary": "red barn"},
    "turns": {
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "Hi"},
            ANSWER := {"role": "assistant", "content": "Hello"},
        ]
    },
    "tools": {"messages": [*ASKED, {"role": "assistant", "content": "three"}], "tools": TOOLS},
    "plain text": {"prompt": "the quick", "completion": " brown fox"},
    "preference with tools": {"tools": TOOLS, "messages": ASKED, "chosen": CALL, "rejected": ANSWER},
}


def source(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(file))


@pytest.mark.parametrize("kind", ROWS)
def test_the_prompt_is_what_training_had_before_the_answer(tmp_path, kind):
    found = source(tmp_path, ROWS[kind])
    (asked,), _ = read_prompts(found)
    tokenizer = tiny_tokenizer(CHATML)
    ((_, row),) = open_source(found, (Chat, PromptCompletion, Text, Ranking)).rows()
    written = row.written()[0] if isinstance(row, Ranking) else row
    ((example,),) = conversations.encode([written], tokenizer)
    start = int(np.flatnonzero(example["supervised"])[0])
    assert conversations.prompt_ids(asked.prompt, tokenizer) == example["input_ids"][:start].tolist()
    assert asked.reference is not None


def test_answers_in_the_file_stay_next_to_their_prompts(tmp_path):
    (asked,), _ = read_prompts(source(tmp_path, ROWS["instruction and context"]))
    expected = {"row": 1, "prompt": "name the day\n\nit was Monday", "reference": "Monday"}
    assert asked.as_dict() == expected
    (asked,), _ = read_prompts(source(tmp_path, ROWS["preference with tools"]))
    shown = asked.as_dict()
    assert shown["tools"] == TOOLS and shown["prompt"][0] == ASKED[0]
    assert shown["reference"][0]["tool_calls"][0]["function"]["name"] == "stock"


UNANSWERED = {"output", "response", "summary", "completion"}


@pytest.mark.parametrize("kind", ["instruction and context", "system and history", "summary"])
def test_a_file_without_answers_has_the_same_prompts(tmp_path, kind):
    """Also where only some rows lack their answer, or have nothing in its place."""
    bare = {key: value for key, value in ROWS[kind].items() if key not in UNANSWERED}
    null = {key: None if key in UNANSWERED else value for key, value in ROWS[kind].items()}
    for rows in ([bare], [ROWS[kind], null], [ROWS[kind], ROWS[kind], bare]):
        prompts, _ = read_prompts(source(tmp_path, *rows))
        assert len({repr(one.prompt) for one in prompts}) == 1
        assert prompts[-1].reference is None


def test_context_is_never_lost_for_want_of_an_answer(tmp_path):
    (one,) = read_prompts(source(tmp_path, {"question": "which day?", "context": "it was Monday"}))[0]
    assert one.prompt.messages[-1]["content"] == "which day?\n\nit was Monday"


@pytest.mark.parametrize("trained_on", ["Chat", "Ranking", "Judged"])
def test_a_plain_list_of_prompts_is_read_whatever_the_model_was_trained_on(trained_on, tmp_path):
    """A file with one column ``prompt`` is no conversation; a chat model answers it all the same."""
    found, _ = read_prompts(source(tmp_path, {"prompt": "Hi"}, {"prompt": "Bye"}), [trained_on])
    asked = ["Hi", "Bye"] if trained_on == "Chat" else [Text("Hi"), Text("Bye")]
    assert [one.prompt for one in found] == asked


def test_a_response_is_a_reference_only_where_it_was_desirable(tmp_path):
    rows = [{"prompt": "Hi", "completion": " a", "label": True}, {"prompt": "Hi", "completion": " b", "label": False}]
    assert [one.reference for one in read_prompts(source(tmp_path, *rows))[0]] == [" a", None]


def test_every_row_without_a_prompt_is_named(tmp_path):
    only = {"messages": [{"role": "assistant", "content": "x"}]}
    with pytest.raises(DataError, match=r"2 bad rows(.|\n)*:1:row(.|\n)*The same in 1 more row: 3"):
        read_prompts(source(tmp_path, only, ROWS["turns"], only))
