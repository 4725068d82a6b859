"""Preferences and rankings in the layouts that files have, and the errors."""

from __future__ import annotations

import json
import math

import pytest

from tunesmith.data.data_config import Source
from tunesmith.data.formats.columns import choose_converter
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.data.rows import ROW_TYPES, Chat, Labelled, PromptCompletion, Question, Ranking, Tagged, Text, digest, without_gold
from tunesmith.errors import DataError


def made(value, accepted=(Ranking,), **options):
    return choose_converter([tuple(value)], path="f", accepted=accepted, **options)(Record("f", 1, 1, value))


def turn(role, text):
    return {"role": role, "content": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def human(text):
    return {"from": "human", "value": text}


Q, A, B, C = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b"), turn("assistant", "c")
MORE = (Q, A, turn("user", "and?"))
PAIR = Ranking((Q,), ((A,), (B,)), (0, 1))
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: and?\n\nAssistant: "

SHAPES = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, Ranking("q", ("a", "b"), (0, 1))),
    ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PAIR),
    ({"prompt": [Q], "chosen": "a", "rejected": "b"}, PAIR),
    ({"prompt": "q", "chosen": [A], "rejected": [B]}, PAIR),
    ({"prompt": "q", "chosen": A, "rejected": B}, PAIR),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    ({"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    ({"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps([B])}, PAIR),
    ({"prompt": '[{"a": 1}] is?', "chosen": "JSON", "rejected": "[{]"}, Ranking('[{"a": 1}] is?', ("JSON", "[{]"), (0, 1))),
    (
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        Ranking((turn("system", "s"), Q), ((A,), (B,)), (0, 1)),
    ),
    ({"system": "", "prompt": "q", "chosen": "a", "rejected": "b"}, Ranking("q", ("a", "b"), (0, 1))),
    ({"prompt": HH, "chosen": "b", "rejected": "c"}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"chosen": [*MORE, B], "rejected": [*MORE, C]}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, PAIR),
    ({"chosen": [human("q"), gpt("a")], "rejected": [human("q"), gpt("b")]}, PAIR),
    ({"chosen": f"{HH}b", "rejected": f"{HH}c "}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"prompt": HH, "chosen": f"{HH}b", "rejected": f"{HH}c"}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"prompt": "and?", "chosen": f"{HH}b", "rejected": f"{HH}c"}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"prompt": MORE, "chosen": f"{HH}b", "rejected": f"{HH}c"}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"instruction": "and?", "chosen": f"{HH}b", "rejected": f"{HH}c"}, Ranking(MORE, ((B,), (C,)), (0, 1))),
    ({"prompt": "who?", "chosen": "Human: a", "rejected": "b"}, Ranking("who?", ("Human: a", "b"), (0, 1))),
    ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, PAIR),
    ({"conversations": [human("q")], "chosen": [gpt("a")], "rejected": "b"}, PAIR),
    ({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    (
        {"system": "s", "conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        Ranking((turn("system", "s"), Q), ((A,), (B,)), (0, 1)),
    ),
    (
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
        Ranking((turn("user", "q\n\nx"),), ((A,), (B,)), (0, 1)),
    ),
    (
        {"instruction": "q", "system": "s", "input": "", "history": [["1", "2"]], "chosen": "a", "rejected": "b"},
        Ranking((turn("system", "s"), turn("user", "1"), turn("assistant", "2"), Q), ((A,), (B,)), (0, 1)),
    ),
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, Ranking((turn("system", "s"), Q), ((A,), (B,)), (0, 1))),
    (
        {"prompt": [Q], "chosen": [CALL, turn("tool", "1"), A], "rejected": [CALL, turn("tool", "1"), B]},
        Ranking((Q,), ((CALL, turn("tool", "1"), A), (CALL, turn("tool", "1"), B)), (0, 1)),
    ),
    ({"prompt": "q", "answers": ["a", "b", "c"]}, Ranking("q", ("a", "b", "c"), (0, 1, 2))),
    ({"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}, Ranking("q", ("a", "b"), (1, 0))),
    ({"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 4.5, 1]}, Ranking("q", ("a", "b", "c"), (1, 0, 1), (1, 4.5, 1))),
    ({"prompt": "q", "answers": ["a", "b", "c"], "labels": [True, False, True]}, Ranking("q", ("a", "b", "c"), (0, 1, 0))),
    ({"prompt": "q", "answers": '["a", "b"]', "scores": "[1, 2]"}, Ranking("q", ("a", "b"), (1, 0), (1, 2))),
    ({"prompt": "q", "answers": ["a", "b"], "ranks": [1, 2], "scores": [7, 3]}, Ranking("q", ("a", "b"), (0, 1), (7, 3))),
    ({"prompt": [Q], "answers": [[A], B, "c"]}, Ranking((Q,), ((A,), (B,), (C,)), (0, 1, 2))),
    ({"instruction": "q", "responses": ["a", "b"]}, PAIR),
    (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}]},
        Ranking((Q,), ((A,), (B,)), (1, 0)),
    ),
    (
        {"prompt": "q", "answers": [{"response": "a", "overall_score": 7}, {"response": "b", "overall_score": 8}]},
        Ranking("q", ("a", "b"), (1, 0), (7, 8)),
    ),
    (
        {"prompt": "q", "answers": [{"text": "a", "rating": "7", "rank": 1}, {"text": "b", "rating": 8}]},
        Ranking("q", ("a", "b"), (1, 0), (7, 8)),
    ),
    ({"prompt": [Q], "answers": [{**A, "score": 1}, {**B, "score": 2}]}, Ranking((Q,), ((A,), (B,)), (1, 0), (1, 2))),
    ({"prompt": "q", "answers": [{"text": "a", "id": 7}, {"text": "b", "id": 8}], "ranks": [2, 1]}, Ranking("q", ("a", "b"), (1, 0))),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row"), SHAPES)
def test_each_shape_is_a_ranking(value, row):
    assert made(value) == row and made(value, ROW_TYPES) == row


SCORED = [
    ({"chosen_score": 9, "rejected_score": 4}, (9.0, 4.0)),
    ({"score_chosen": 9, "score_rejected": 4}, (9.0, 4.0)),
    ({"chosen-rating": 5, "rejected-rating": "4.5"}, (5.0, 4.5)),
    ({"margin": 2}, (2.0, 0.0)),
    ({"scores": [8, 3]}, (8.0, 3.0)),
    ({"rating": "[8, 3.5]", "margin": 1}, (8.0, 3.5)),
    ({"ratings": [8, 3], "score_chosen": 9, "score_rejected": 4}, (9.0, 4.0)),
    ({"scores": None}, None),
    ({"chosen_score": None, "rejected_score": None, "margin": None}, None),
]


@pytest.mark.parametrize(("given", "scores"), SCORED)
@pytest.mark.parametrize("prompt", [{"prompt": "q"}, {"instruction": "q"}, {"conversations": [human("q")]}])
def test_scores_of_a_pair(given, scores, prompt):
    assert made({**prompt, "chosen": "a", "rejected": "b", **given}).scores == scores


TO_SCORE = [
    ({"prompt": "q", "chosen": "a", "rejected": "a "}, Ranking("q", ("a", "a "), (0, 0))),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan}, Ranking("q", ("a", "b"), (0, 0))),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}, Ranking("q", ("a", "b"), (0, 0))),
    ({"chosen": [Q, A], "rejected": [Q, A]}, Ranking((Q,), ((A,), (A,)), (0, 0))),
    ({"prompt": "q", "answers": ["a", "b", "a"]}, Ranking("q", ("a", "b", "a"), (0, 0, 0))),
    ({"prompt": "q", "answers": ["a"], "scores": [1, 2]}, Ranking("q", ("a",), (0,))),
    ({"prompt": "q", "answers": ["a", "b"], "labels": [0, 0]}, Ranking("q", ("a", "b"), (0, 0))),
    ({"prompt": "q", "answers": [{"text": "a", "score": math.nan}, {"text": "b"}]}, Ranking("q", ("a", "b"), (0, 0))),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row"), TO_SCORE)
def test_grades_of_rows_to_score_are_ignored(value, row):
    assert made(value, gold=False) == row and isinstance(made(value), RowProblem)


X, Y, Z = ({"text": text} for text in "abc")
SAME = "two answers to the same prompt"
REFUSED = [
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected", "an answer with something in it", "empty text"),
    ({"prompt": "q", "chosen": " \n", "rejected": "b"}, "chosen", "an answer with something in it", "only spaces"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "chosen", "an answer with something in it", "null"),
    ({"prompt": [Q], "chosen": [], "rejected": [B]}, "chosen", "an answer with something in it", "an empty list"),
    ({"chosen": [turn("user", ""), A], "rejected": [Q, B]}, "chosen[0].content", "text", "empty text"),
    ({"prompt": [Q], "chosen": [turn("assistant", "")], "rejected": [B]}, "chosen[0].content", "an answer with", "empty text"),
    ({"conversations": [human("q")], "chosen": gpt(""), "rejected": gpt("b")}, "chosen.value", "an answer with", "empty text"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt", "text", "empty text"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt", "text", "null"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen", "text", "a number 3"),
    ({"prompt": "q", "chosen": "a", "rejected": " a\n"}, "rejected", "two answers that differ", "'chosen', too"),
    ({"prompt": [Q], "chosen": [A], "rejected": "a "}, "rejected", "two answers that differ", "'chosen', too"),
    ({"chosen": [Q, A], "rejected": [Q, A]}, "rejected", "two answers that differ", "'chosen', too"),
    ({"chosen": [Q, A], "rejected": [turn("user", "other"), B]}, "rejected", SAME, "from turn 1 on: 'q' and 'other'"),
    ({"chosen": [*MORE, B], "rejected": [Q, A, turn("user", "so?"), C]}, "rejected", SAME, "from turn 3 on: 'and?' and 'so?'"),
    ({"chosen": [Q, A], "rejected": [*MORE, C]}, "rejected", SAME, "from turn 3 on: nothing and 'and?'"),
    ({"chosen": [Q, A, B], "rejected": [Q, A, C]}, "rejected", SAME, "from turn 3 on: 'b' and 'c'"),
    ({"chosen": [*MORE, B], "rejected": [Q, B, turn("user", "and?"), C]}, "rejected", SAME, "from turn 2 on"),
    ({"chosen": [turn("system", "s"), Q, A], "rejected": [turn("system", "s"), A]}, "rejected", SAME, "'q' and 'a'"),
    ({"chosen": f"{HH}b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "rejected", SAME, "from turn 1 on"),
    ({"chosen": f"{HH}b", "rejected": HH}, "rejected[3]", "an answer with something in it", "empty text"),
    ({"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": f"{HH}b"}, "chosen[0]", "what Human says", "empty text"),
    ({"chosen": "a", "rejected": "b"}, "chosen", "a conversation, because the row has no prompt", "'a'"),
    ({"chosen": [A], "rejected": [B]}, "chosen", SAME, "an answer alone"),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [B]}, "chosen", SAME, "a whole conversation"),
    ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "prompt", "the question in 'chosen' and 'rejected'", "'other'"),
    ({"prompt": "other", "chosen": f"{HH}b", "rejected": f"{HH}c"}, "prompt", "the question in 'chosen'", "'other'"),
    ({"prompt": HH, "chosen": f"{HH}b", "rejected": "c"}, "chosen", SAME, "a whole conversation"),
    ({"prompt": HH, "answers": [f"{HH}b", f"{HH}c"]}, "answers[0]", "an answer: turns", "user, assistant, user, assistant"),
    ({"prompt": [Q, A], "chosen": [B], "rejected": [C]}, "prompt", "a prompt that ends with a turn of the user", "assistant"),
    ({"prompt": [turn("system", "s")], "chosen": [B], "rejected": [C]}, "prompt", "a prompt that ends with", "system"),
    ({"prompt": [Q], "chosen": [A, Q], "rejected": [B]}, "chosen", "an answer: turns of the assistant", "assistant, user"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.inf}, "margin", "a finite number", "inf"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "nan"}, "margin", "a finite number", "nan"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin", "a number", "'much'"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "margin", "a finite number", "1000"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": True}, "margin", "a number", "true"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}, "rejected_score", "a score", "nothing"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "scores": [1, 2, 3]}, "scores", "a list of 2 numbers", "3: a list"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "rating": 4}, "rating", "a list of 2 numbers", "a number 4"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "scores": [1, math.nan]}, "scores[1]", "a finite number", "nan"),
    ({"prompt": "q", "answers": ["a"]}, "answers", "two answers or more", "1"),
    ({"prompt": "q", "answers": []}, "answers", "two answers or more", "0"),
    ({"prompt": "q", "answers": "a"}, "answers", "a list of answers", "'a'"),
    ({"prompt": "q", "answers": [{**X, "score": 1}, Y, {**Z, "score": 9}]}, "answers[1].score", "a score, as other", "nothing"),
    ({"prompt": "q", "answers": [X, {**Y, "rank": 1}]}, "answers[0].rank", "a rank, as other answers", "nothing"),
    ({"prompt": "q", "answers": [{**X, "score": None}, {**Y, "score": 1}]}, "answers[0].score", "a number", "null"),
    ({"prompt": "q", "answers": [{**X, "stars": 1}, {**Y, "stars": 5}]}, "answers[0].stars", "a grade under rank,", "'stars'"),
    ({"prompt": "q", "answers": [X, {**Y, "best": True}]}, "answers[1].best", "a grade under rank,", "'best'"),
    ({"prompt": "q", "answers": ["a", ""]}, "answers[1]", "an answer with something in it", "empty text"),
    ({"prompt": "q", "answers": ["a", "b", "a"]}, "answers[2]", "two answers that differ", "'answers[0]', too"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [1, math.nan]}, "scores[1]", "a finite number", "nan"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "scores", "a list of 2 numbers", "1: a list"),
    ({"prompt": "q", "answers": ["a", "b"], "ranks": [1, None]}, "ranks[1]", "a number", "null"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [3, 3]}, "answers", "an answer that is better", "the same rank for all"),
    ({"prompt": "q", "answers": [{"said": "a"}, {"said": "b"}]}, "answers", "objects with one of answer,", "an object"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "field", "expected", "got"), REFUSED)
def test_rows_that_cannot_be_compared_are_refused(value, field, expected, got):
    problem = made(value)
    assert isinstance(problem, RowProblem) and problem.where == f"f:1:{field}"
    assert problem.expected.startswith(expected) and got in problem.got and problem.fix


def test_a_prompt_template_makes_the_prompt_a_text():
    template = {"prompt_template": "Q: {ask}\nA: "}
    row = made({"ask": "why", "chosen": "a", "rejected": "b", "margin": 2}, **template)
    assert row == Ranking("Q: why\nA: ", ("a", "b"), (0, 1), (2.0, 0.0))
    row = made({"ask": "why", "responses": ["a", "b"], "scores": [1, 2]}, **template)
    assert row == Ranking("Q: why\nA: ", ("a", "b"), (1, 0), (1.0, 2.0))


def test_a_row_to_score_needs_an_answer():
    assert made({"prompt": "q", "answers": []}, gold=False).expected == "an answer or more"
    assert made({"prompt": "q", "chosen": "a", "rejected": ""}, gold=False).where == "f:1:rejected"


def test_mapped_columns_are_named_as_in_the_file():
    value = {"ask": "q", "good": "a", "bad": "b"}
    columns = {"instruction": "ask", "chosen": "good", "rejected": "bad"}
    assert made(value, columns=columns) == PAIR
    assert made({**value, "bad": "a"}, columns=columns).where == "f:1:bad"


def test_a_missing_side_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path.write_text(
        "\n".join(json.dumps(row) for row in (good, good, {"prompt": "q", "chosen": "a"}, {"chosen": "a", "rejected": "b"}))
    )
    *_, one, other = open_source(Source(path=str(path)), (Ranking,)).rows()
    assert [problem.where for problem in (one, other)] == [f"{path}:3:rejected", f"{path}:4:prompt"]


def test_answers_that_are_the_same_may_be_a_tie():
    assert made({"prompt": "q", "answers": ["a", "b", "a"], "scores": [2, 1, 2]}).ranks == (0, 1, 0)


BEFORE = [
    ({"conversations": [human("q"), gpt("a")]}, "sharegpt", Chat),
    ({"messages": [Q, A]}, "messages", Chat),
    ({"prompt": "q", "completion": "a"}, "prompt_completion", PromptCompletion),
    ({"prompt": "q", "response": "a"}, "question_answer", Chat),
    ({"instruction": "q", "output": "a"}, "alpaca", Chat),
    ({"question": "q", "context": "c a", "answers": [{"text": "a", "answer_start": 2}]}, "squad", Question),
    ({"text": "t", "labels": ["a"]}, "multilabel", Labelled),
    ({"text": "t", "label": "a"}, "labelled", Labelled),
    ({"text": "t", "score": 1}, "labelled", Labelled),
    ({"tokens": ["a"], "tags": ["O"]}, "tokens", Tagged),
    ({"text": "t"}, "text", Text),
]


@pytest.mark.parametrize(("value", "form", "row"), BEFORE)
def test_rankings_and_other_formats_are_distinguished(value, form, row):
    assert choose_converter([tuple(value)], path="f", accepted=ROW_TYPES).form.name == form
    with pytest.raises(DataError):
        choose_converter([tuple(value)], path="f", accepted=(Ranking,))


@pytest.mark.parametrize("extra", [{"output": "x"}, {"completion": "x"}, {"response": "x"}, {"messages": [Q, A]}, {"text": "t"}])
def test_sft_reads_the_same_columns_next_to_chosen_and_rejected(extra):
    """Columns of two formats: the accepted row types select one."""
    value = {"instruction": "q", "prompt": "q", "chosen": "a", "rejected": "b", **extra}
    assert not isinstance(made(value, (Chat, PromptCompletion, Text)), Ranking) and isinstance(made(value), Ranking)


def test_the_published_pairs_are_read(tmp_path):
    """The layout of dpo_en_demo.json, with a system turn and earlier turns."""
    rows = [
        {"conversations": [{"from": "system", "value": "s"}, human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        {"conversations": [human("q"), gpt("a"), human("and?")], "chosen": gpt("b"), "rejected": gpt("c")},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    opened = open_source(Source(path=str(path)), (Ranking,))
    assert opened.description.startswith("preference_turns (conversations, chosen, rejected);") and opened.kinds == {
        Ranking,
        Chat,
    }
    first, second = (row for _, row in opened.rows())
    assert first == Ranking((turn("system", "s"), Q), ((A,), (B,)), (0, 1)) and second == Ranking(MORE, ((B,), (C,)), (0, 1))


def test_plain_rankings_need_no_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    assert open_source(Source(path=str(path)), (Ranking,)).kinds == {Ranking}


def test_a_ranking_without_gold_has_no_order():
    row = Ranking("q", ("a", "b"), (1, 0), (1.0, 2.0))
    assert without_gold(row) == Ranking("q", ("a", "b"), (0, 0)) and digest(row) != digest(without_gold(row))
