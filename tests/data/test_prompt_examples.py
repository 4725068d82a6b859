"""Prompts to tokens: what generation reads, the row for the rewards, length policies, cache, preview and hold-out."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from pydantic import BaseModel

from tests.data.tokenizers import tokenizer_of
from tests.data.zoo import ZOO
from tunesmith.data.check.preview import preview
from tunesmith.data.data_config import DataConfig, Source
from tunesmith.data.encode import conversations, prompt_examples
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, Prompt
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import DataError
from tunesmith.objectives import Traits
from tunesmith.train import samples

Q, A, S = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}
NAME = next(iter(ZOO))


@pytest.fixture(scope="module")
def chat():
    return copy.deepcopy(ZOO[NAME].tokenizer())


@pytest.fixture(scope="module")
def plain():
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.chat_template = None
    return tokenizer


ROWS = [
    Prompt("Wie geht's?", {"answer": "gut"}),
    Prompt((S, Q, A, {"role": "user", "content": "안녕 🦊"}), {"정답": ["셋", 3, 0.5, None]}),
    Prompt((Q,), {}, ({"type": "function", "function": {"name": "f", "parameters": {}}},)),
]


def test_the_tokens_are_those_that_generation_reads(chat, plain):
    for tokenizer in (chat, plain):
        rows = ROWS if tokenizer is chat else ROWS[:1]
        for row, (example,) in zip(rows, prompt_examples.encode(rows, tokenizer), strict=True):
            asked = row.prompt if isinstance(row.prompt, str) else Chat(row.prompt, row.tools)
            assert example["input_ids"].tolist() == conversations.prompt_ids(asked, tokenizer)
            assert prompt_examples.decode_row(example) == row
    as_turn = prompt_examples.encode([Prompt(({"role": "user", "content": "Wie geht's?"},))], chat)[0][0]
    assert as_turn["input_ids"].tolist() == prompt_examples.encode(ROWS, chat)[0][0]["input_ids"].tolist()


def test_a_turn_token_typed_in_a_prompt_is_text(chat):
    typed = f"say {chat.eos_token} now"
    ((example,),) = prompt_examples.encode([Prompt(typed)], chat)
    ((clean,),) = prompt_examples.encode([Prompt("say now")], chat)
    assert list(example["input_ids"]).count(chat.eos_token_id) == list(clean["input_ids"]).count(chat.eos_token_id)


LONG = Prompt("Q7 x9 z1 j5 w8 v3")


def test_a_prompt_above_the_limit_follows_the_policy(plain):
    ((whole,),) = prompt_examples.encode([LONG], plain)
    size = len(whole["input_ids"])
    assert prompt_examples.encode([LONG], plain, max_length=size)[0][0]["cut"].tolist() == [0]
    with pytest.raises(RowFault, match=f"at most {size - 3} tokens, got {size} tokens.*max_new_tokens"):
        prompt_examples.encode([LONG], plain, max_length=size - 3)
    assert prompt_examples.encode([LONG], plain, max_length=size - 3, overlong="drop") == [[]]
    ((cut,),) = prompt_examples.encode([LONG], plain, max_length=size - 3, overlong="truncate")
    assert cut["cut"].tolist() == [3] and list(cut["input_ids"]) == list(whole["input_ids"][3:])
    assert prompt_examples.encode([Prompt("0")], plain, max_length=0, overlong="truncate") == [[]]


class Options(BaseModel):
    """No keys."""


class Sampling:
    """The part of a sampling objective that reads its rows."""

    config, facts, max_length = Options(), {}, None  # type: ignore[var-annotated]
    traits = Traits(rows=(Prompt,), fits_rows=True)

    def scan(self, rows):
        pass

    def encode(self, rows, tokenizer):
        return prompt_examples.encode(rows, tokenizer, max_length=self.max_length)

    encode_held_out = encode

    def extend(self, data):
        return data


def prepared(path, tokenizer, objective=None, **config):
    settings = DataConfig(**{"train": [Source(path=str(path))], "cache": False, **config})
    return prepare(settings, objective or Sampling(), tokenizer, max_length=None, window=None, seed=0)


def rows_file(folder, count=20):
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"Question {n // 2}", "answer": f"답 {n}"} for n in range(count)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def test_rows_are_mapped_held_out_by_prompt_and_decoded_by_place(tmp_path, plain):
    made = prepared(rows_file(tmp_path), plain, eval={"fraction": 0.2})
    sides = [[prompt_examples.decode_row(data[n]) for n in range(len(data))] for data in (made.train, made.eval)]
    assert not {row.prompt for row in sides[0]} & {row.prompt for row in sides[1]} and len(sides[1]) == 4
    assert sorted(row.columns["answer"] for side in sides for row in side) == sorted(f"답 {n}" for n in range(20))
    assert made.report.train.overlong["dropped"] == 0 and made.report.contaminated is not None
    assert made.train[0]["content"].base is not None and made.kinds == ("Prompt",)


def test_rows_of_a_kept_cache_are_read_again_and_columns_belong_to_its_key(tmp_path, plain, monkeypatch):
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    path = rows_file(tmp_path)
    assert [prepared(path, plain, cache=True).report.cached for _ in range(2)] == [False, True]
    path.write_text(path.read_text().replace("답 3", "답 x"), encoding="utf-8")
    again = prepared(path, plain, cache=True, eval={"fraction": 0})
    assert not again.report.cached
    answers = [prompt_examples.decode_row(again.train[n]).columns["answer"] for n in range(4)]
    assert answers == ["답 0", "답 1", "답 2", "답 x"]


def test_the_template_of_the_tokenizer_is_reported_for_text_prompts(tmp_path, chat, plain):
    assert prepared(rows_file(tmp_path), copy.deepcopy(chat)).report.template == "the model's own chat template"
    assert "plain text" in prepared(rows_file(tmp_path), plain).report.template


def test_empty_and_long_prompts_are_named_before_anything_is_trained(tmp_path, plain):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": ""}\n' + json.dumps({"prompt": "long " * 50}) + "\n")
    limited = Sampling()
    limited.max_length = 40
    with pytest.raises(DataError) as caught:
        prepared(path, plain, limited)
    assert caught.value.exit_code == 2
    assert "bad.jsonl:2:prompt" in str(caught.value) and "bad.jsonl:3:row" in str(caught.value)
    assert "a prompt of at most 40 tokens" in str(caught.value)


def test_preview_shows_the_prompt_and_the_columns(tmp_path, chat):
    tokenizer = apply_template(copy.deepcopy(chat), None)[0]
    (row,) = preview(Source(path=str(rows_file(tmp_path))), Sampling(), tokenizer, rows=1).rows
    assert "Question 0" in "".join(text for text, _ in row.pieces) and "answer: '답 0'" in row.head()
    assert row.supervised == 0 and row.tokens == len(conversations.prompt_ids("Question 0", tokenizer))


def test_a_sample_prompt_is_the_whole_row_and_has_no_reference(tmp_path, plain):
    made = prepared(rows_file(tmp_path), plain)
    config = samples.SampleConfig(count=1)
    (prompt,) = samples.prompts(config, made.train, plain)
    assert prompt.ids == made.train[0]["input_ids"].tolist() and prompt.reference is None
    assert np.array_equal(prompt.ids, conversations.prompt_ids("Question 0", plain))
