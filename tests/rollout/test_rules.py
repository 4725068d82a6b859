"""Each rule against cases computed by hand, Korean text included."""

from __future__ import annotations

import unicodedata

import pytest
from pydantic import ValidationError

from tests.rollout.completions import answered
from tunesmith.rollout.rules import ContainsReward, ExactReward, FinalStopReward, LengthReward, RegexReward

NFD = unicodedata.normalize("NFD", "안녕하세요")


@pytest.mark.parametrize(
    ("keys", "answer", "reward"),
    [
        ({"target": 20}, answered("x", tokens=13), -7),
        ({"target": 20}, answered("x", tokens=26), -6),
        ({"target": 20}, answered("x", tokens=20), 0),
        ({"target": 20}, answered("x", tokens=20, stopped=False), 0),  # the stop token is not counted
        ({"max": 4, "unit": "words"}, answered("one two  three\nfour"), 0),
        ({"max": 4, "unit": "words"}, answered("one two three four five six"), -2),
        ({"max": 2, "unit": "words"}, answered("오늘 날씨가 좋네요"), -1),
        ({"target": 0, "unit": "words"}, answered(" \n "), 0),
        ({"target": 5, "unit": "characters"}, answered("안녕하세요"), 0),
        ({"target": 5, "unit": "characters"}, answered(NFD), 0),
        ({"target": 3, "unit": "characters"}, answered("a b c"), -2),
    ],
)
def test_length(keys, answer, reward):
    assert LengthReward(**keys).score(answer) == reward


@pytest.mark.parametrize(
    ("keys", "text", "reward"),
    [
        ({"pattern": r"\d+"}, "the answer is 42.", 1),
        ({"pattern": r"\d+"}, "no number", 0),
        ({"pattern": r"\d+", "match": "fullmatch"}, "42", 1),
        ({"pattern": r"\d+", "match": "fullmatch"}, "42.", 0),
        ({"pattern": "요$"}, "좋네요", 1),
        ({"pattern": "^안녕하세요$"}, NFD, 1),
        ({"pattern": unicodedata.normalize("NFD", "안녕")}, "안녕하세요", 1),
        ({"pattern": "(?i)yes"}, "YES", 1),
        ({"pattern": "^<think>.*</think>", "match": "search"}, "<think>a\nb</think>", 0),
        ({"pattern": "(?s)^<think>.*</think>"}, "<think>a\nb</think>", 1),
    ],
)
def test_regex(keys, text, reward):
    assert RegexReward(**keys).score(answered(text)) == reward


@pytest.mark.parametrize(
    ("keys", "answer", "reward"),
    [
        ({"text": "Paris"}, answered("It is Paris."), 1),
        ({"text": "paris"}, answered("It is Paris."), 0),
        ({"text": "paris", "ignore_case": True}, answered("It is Paris."), 1),
        ({"text": ["a", "b"]}, answered("a b"), 1),
        ({"text": ["a", "z"]}, answered("a b"), 0),
        ({"text": "안녕"}, answered(NFD), 1),
        ({"column": "must"}, answered("날씨가 좋네요", must=["날씨", "좋네"]), 1),
        ({"column": "must"}, answered("7 and 8", must=7), 1),
    ],
)
def test_contains(keys, answer, reward):
    assert ContainsReward(**keys).score(answer) == reward


GSM8K = {"column": "answer", "pattern": r"#### (.+)"}


@pytest.mark.parametrize(
    ("keys", "answer", "reward"),
    [
        ({"column": "answer"}, answered(" Paris \n", answer="Paris"), 1),
        ({"column": "answer"}, answered("paris", answer="Paris"), 0),
        ({"column": "answer", "ignore_case": True}, answered("paris", answer="PARIS"), 1),
        ({"column": "answer"}, answered(NFD, answer="안녕하세요"), 1),
        ({"column": "정답"}, answered("셋", 정답=["하나", "셋"]), 1),
        ({"column": "answer"}, answered("7", answer=7), 1),
        ({"column": "answer"}, answered("7.0", answer=7), 1),
        ({"column": "answer"}, answered("1,000", answer="1000"), 1),
        ({"column": "answer"}, answered("7 apples", answer=7), 0),
        ({"column": "answer"}, answered("True", answer=True), 1),
        (GSM8K, answered("3 + 4 = 7\n#### 7", answer="so\n#### 7"), 1),
        (GSM8K, answered("#### 8, no: \n#### 7", answer="7"), 1),
        (GSM8K, answered("7", answer="#### 7"), 0),
        (GSM8K, answered("#### 8", answer="#### 7"), 0),
    ],
)
def test_exact(keys, answer, reward):
    assert ExactReward(**keys).score(answer) == reward


def test_final_stop():
    assert [FinalStopReward().score(answered("x", stopped=stopped)) for stopped in (True, False)] == [1, 0]


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (LengthReward, {}, "either target or max"),
        (LengthReward, {"target": 3, "max": 4}, "either target or max"),
        (LengthReward, {"target": -1}, "greater than or equal to 0"),
        (LengthReward, {"target": 3, "unit": "lines"}, "'tokens', 'words' or 'characters'"),
        (RegexReward, {"pattern": "("}, r"'\(' is no regular expression"),
        (ContainsReward, {}, "either text or column"),
        (ContainsReward, {"text": ""}, "must not be empty"),
        (ExactReward, {"column": "a", "pattern": "####"}, "one group"),
        (ExactReward, {"column": "a", "pattern": "(a)(b)"}, "one group"),
        (FinalStopReward, {"name": "two words"}, "pattern"),
        (FinalStopReward, {"weight": float("nan")}, "finite"),
        (FinalStopReward, {"weigth": 1.0}, "Extra inputs"),
    ],
)
def test_wrong_arguments_are_refused(kind, keys, message):
    with pytest.raises(ValidationError, match=message):
        kind(**keys)
