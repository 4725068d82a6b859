"""Rankings as tokens: the prompt once, then each answer with the tokens that it has in a row without the others."""

from __future__ import annotations

import copy
import itertools
import json
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tokenizers import KINDS, tokenizer_of
from tests.data.zoo import ZOO
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.encode import conversations
from tunesmith.data.encode.rankings import encode
from tunesmith.data.encode.templates import apply_template, special_ends
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, PromptCompletion, Ranking
from tunesmith.data.store import cache
from tunesmith.data.store.prepare import prepare
from tunesmith.objectives import Config, Objective, Traits

ENDING = [kind for kind in KINDS if tokenizer_of(kind).eos_token]
"""Tokenizers with an end token, which closes a row."""

WORDS = ["fox", "Paris", " quick", "안녕하세요", "\n", "  ", "01234", "naïve", "🦊", "x", "."]

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join).filter(str.strip)
ranked = st.integers(2, 5).flatmap(
    lambda k: st.tuples(
        st.lists(texts, min_size=k, max_size=k),
        st.lists(st.integers(0, 3), min_size=k, max_size=k),
        st.none() | st.lists(st.floats(-9, 9, width=32), min_size=k, max_size=k),
    )
)


@lru_cache
def templated(name):
    """A tokenizer of ZOO, or one of KINDS with the template ``roles``."""
    if name in ZOO:
        return ZOO[name].tokenizer()
    tokenizer = copy.deepcopy(tokenizer_of(name))
    tokenizer.chat_template = None
    return apply_template(tokenizer, "roles")[0]


def user(text):
    return ({"role": "user", "content": text},)


def said(text):
    return ({"role": "assistant", "content": text},)


def row_of(prompt, judged, plain):
    answers, ranks, scores = judged
    answers = tuple(answers) if plain else tuple(map(said, answers))
    return Ranking(prompt if plain else user(prompt), answers, tuple(ranks), None if scores is None else tuple(scores))


def parts(example):
    """(ids, loss mask) of each answer with the prompt before it."""
    shared, *lengths = example["answers"].tolist()
    ends = np.cumsum([shared, *lengths])
    for start, end in itertools.pairwise(ends):
        yield tuple(np.concatenate([example[name][:shared], example[name][start:end]]) for name in ("input_ids", "supervised"))


def alone(row, tokenizer):
    """The tokens of each answer in a separate row, by ``conversations.encode``."""
    for answer in row.answers:
        plain = isinstance(row.prompt, str)
        single = PromptCompletion(row.prompt, answer) if plain else Chat((*row.prompt, *answer), row.tools)
        ((example,),) = conversations.encode([single], tokenizer)
        yield example["input_ids"], example["supervised"]


def check(rows, tokenizer):
    for row, (example,) in zip(rows, encode(rows, tokenizer, max_length=None, overlong="error"), strict=True):
        wholes = list(alone(row, tokenizer))
        for (ids, mask), (its, supervised) in zip(parts(example), wholes, strict=True):
            assert np.array_equal(ids, its) and np.array_equal(mask, supervised)
        shared, *lengths = example["answers"].tolist()
        assert shared + sum(lengths) == len(example["input_ids"]) == len(example["supervised"]) and min(lengths) >= 1
        assert not example["supervised"][:shared].any()
        longer = {
            tuple(ids[: shared + 1].tolist()) if len(ids) > shared + 1 and not mask[shared] else None for ids, mask in wholes
        }
        assert len(longer) > 1 or longer == {None}, "the shared prompt could be longer"
        expected = [(a, b) for a in range(len(row.ranks)) for b in range(len(row.ranks)) if row.ranks[a] < row.ranks[b]]
        assert example["pairs"].reshape(-1, 2).tolist() == [list(pair) for pair in expected]
        margins = [row.scores[a] - row.scores[b] if row.scores else 0.0 for a, b in expected]
        assert np.array_equal(example["margins"], np.array(margins, np.float32)) and example["cut"].tolist() == [0]
        kinds = {name: str(array.dtype) for name, array in example.items()}
        assert kinds == {
            "input_ids": "int32", "answers": "int32", "supervised": "bool", "pairs": "int32", "margins": "float32", "cut": "int32",
        }  # fmt: skip
        assert cache.targets(example) == 1, "a ranking is one unit of the loss, however many tokens are supervised"


@pytest.mark.parametrize("kind", ENDING)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, ranked), min_size=1, max_size=3))
def test_plain_answers_have_the_tokens_of_their_completions(kind, drawn):
    check([row_of(prompt, judged, True) for prompt, judged in drawn], tokenizer_of(kind))


@pytest.mark.parametrize("name", [*ENDING, *ZOO])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(texts, ranked), min_size=1, max_size=3))
def test_answers_of_turns_have_the_tokens_of_their_conversations(name, drawn):
    check([row_of(prompt, judged, False) for prompt, judged in drawn], templated(name))


@pytest.mark.parametrize("kind", ENDING)
@settings(max_examples=25, deadline=None)
@given(texts, ranked, st.integers(-3, 40), st.booleans())
def test_truncation_removes_only_the_beginning_of_the_prompt(kind, prompt, judged, more, plain):
    tokenizer = tokenizer_of(kind) if plain else templated(kind)
    row = row_of(prompt * 4, judged, plain)
    ((whole,),) = encode([row], tokenizer, max_length=None, overlong="error")
    shared, *lengths = whole["answers"].tolist()
    before = special_ends(tokenizer)[0]
    assert whole["input_ids"][: len(before)].tolist() == before, "each of these tokenizers begins every row so"
    limit = max(1, max(lengths) + len(before) + 1 + more)
    surplus = max(0, shared + max(lengths) - limit)
    ((made, *rest),) = [group or [None] for group in encode([row], tokenizer, max_length=limit, overlong="truncate")]
    assert not rest
    if surplus and shared - len(before) - surplus < 1:
        assert made is None
        return
    assert made["cut"].tolist() == [surplus] and made["answers"].tolist() == [shared - surplus, *lengths]
    assert max(len(ids) for ids, _ in parts(made)) <= limit
    for (ids, mask), (its, supervised) in zip(parts(made), parts(whole), strict=True):
        kept = [*before, *its[len(before) + surplus :].tolist()]
        assert ids.tolist() == kept and mask[len(before) :].tolist() == supervised[len(before) + surplus :].tolist()
    assert np.array_equal(made["pairs"], whole["pairs"]) and np.array_equal(made["margins"], whole["margins"])


def test_the_prompt_is_encoded_once():
    tokenizer = templated("chatml")
    ((example,),) = encode(
        [Ranking(user("q" * 300), (said("yes"), said("no")), (0, 1))],
        tokenizer,
        max_length=None,
        overlong="error",
    )
    text = tokenizer.decode(example["input_ids"])
    assert text.count("q" * 300) == 1 and "assistant\nyes<|im_end|>\nno<|im_end|>\n" in text


def test_a_token_across_prompt_and_answer_belongs_to_the_answer():
    """If one token covers the end of the prompt and the beginning of an answer, it belongs to that answer."""
    tokenizer = tokenizer_of("bytes")
    row = Ranking("the quick br", ("own fox", "ick"), (0, 1))
    ((example,),) = encode([row], tokenizer, max_length=None, overlong="error")
    whole = tokenizer("the quick br", add_special_tokens=False)["input_ids"]
    assert example["answers"][0] < len(whole)
    check([row], tokenizer)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_all_turns_of_the_assistant_in_an_answer_are_supervised(name):
    """An answer that calls a tool: the call and the text after it, but neither the result nor earlier turns."""

    def calling(city):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        spoken = {"role": "assistant", "content": "", "tool_calls": [call]}
        return (spoken, {"role": "tool", "content": "21 degrees"}, *said(f"Warm in {city}."))

    tokenizer = templated(name)
    prompt = (*user("hello"), *said("earlier"), *user("how warm is it?"))
    row = Ranking(prompt, (calling("Paris"), calling("Rome")), (0, 1))
    ((example,),) = encode([row], tokenizer, max_length=None, overlong="error")
    for (ids, mask), city in zip(parts(example), ("Paris", "Rome"), strict=True):
        text = tokenizer.decode(ids[mask])
        assert f'"city": "{city}"' in text and f"Warm in {city}." in text
        assert "degrees" not in text and "earlier" not in text and "how" not in text
    assert "weather" not in tokenizer.decode(example["input_ids"][: example["answers"][0]])


def test_an_overlong_row_is_refused_or_dropped():
    tokenizer = tokenizer_of("bytes")
    rows = [Ranking("a b", ("c", "d"), (0, 1)), Ranking("a b", ("c " * 50, "d"), (0, 1))]
    with pytest.raises(RowFault, match=r"at most 20 tokens.*if the model's window is that long") as raised:
        encode(rows, tokenizer, max_length=20, overlong="error")
    assert raised.value.index == 1
    ((whole,),) = encode(rows[1:], tokenizer, max_length=None, overlong="error")
    exact = max(len(ids) for ids, _ in parts(whole))
    for policy in ("error", "drop", "truncate"):
        ((made,),) = encode(rows[1:], tokenizer, max_length=exact, overlong=policy)
        assert made["cut"].tolist() == [0]
    for policy in ("drop", "truncate"):
        first, second = encode(rows, tokenizer, max_length=20, overlong=policy)
        assert len(first) == 1 and second == []


def test_a_fault_names_the_row_and_the_answer():
    good = Ranking(user("q"), (said("a"), said("b")), (0, 1))
    bad = Ranking(user("q"), (said("a"), user("q") + said("b")), (0, 1))  # gemma wants turns to alternate
    with pytest.raises(RowFault, match=r"answer 2") as raised:
        encode([good, bad], templated("gemma"), max_length=None, overlong="error")
    assert raised.value.index == 1


def test_the_report_counts_preferences_that_the_template_shortens(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *user("q")]
    rows = [{"prompt": turns[n % 2 :], "chosen": f"yes {n}", "rejected": "no"} for n in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=[Source(path=str(path))], eval=EvalConfig(fraction=0), cache=False)
    made = prepare(config, Comparing(), templated("llama2"), max_length=None, window=None, seed=0)
    found = made.report.sources[0].left_out
    assert (found["looked_at"], found["rows"]) == (6, 3)
    assert found["first"][:2] == [f"{path}:{row}:messages[0].content: 'Be brief.'" for row in (1, 3)]


class Comparing(Objective):
    """The part of an objective on rankings that ``prepare`` needs."""

    traits = Traits(rows=(Ranking,), overlong="drop")

    def __init__(self):
        super().__init__(Config())

    def encode(self, rows, tokenizer):
        return encode(rows, tokenizer, max_length=None, overlong="error")


def test_prepared_rows_equal_encoded_rows(tmp_path):
    rows = [{"prompt": [*user(f"{n} or?")], "chosen": f"yes {n}", "rejected": "no", "margin": n} for n in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = copy.deepcopy(templated("chatml"))
    config = DataConfig(train=[Source(path=str(path))], eval=EvalConfig(fraction=0), cache=False)
    made = prepare(config, Comparing(), tokenizer, max_length=None, window=None, seed=0)
    assert len(made.train) == 6 and made.report.template == "the model's own chat template"
    parsed = [row for _, row in open_source(config.train[0], (Ranking,)).rows()]
    for index, (example,) in enumerate(encode(parsed, tokenizer, max_length=None, overlong="error")):
        found = made.train[index]
        assert all(np.array_equal(found[name], example[name]) and found[name].dtype == example[name].dtype for name in example)
        assert found["margins"].tolist() == [index]
