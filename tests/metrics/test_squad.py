"""Exact match and F1 by hand, from the definitions of SQuAD; thresholds against trying all of them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.metrics import squad


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("a-b", "ab"),
        ("An apple a day", "apple day"),
        ("theatre another", "theatre another"),
        ("«Paris»", "«paris»"),  # punctuation is that of ASCII
        ("U.S.A", "usa"),
        ("a.", ""),
        ("t.h.e end", "end"),  # punctuation goes first: what it leaves may be an article
        ("서울\n 특별시!", "서울 특별시"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert squad.normalise(text) == expected


def test_exact():
    assert squad.exact_match("the Cat!", ["dog", "cat"]) == 1.0
    assert squad.exact_match("cats", ["cat"]) == 0.0


@pytest.mark.parametrize(
    ("said", "golds", "expected"),
    [
        ("black cat", ["cat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),  # counted as often as they occur
        ("cat cat", ["cat cat dog"], 4 / 5),
        ("dog", ["cat", "big dog", "a dog"], 1.0),
        ("bird", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("서울은", ["서울"], 0.0),  # words between white space
        ("北京市", ["北京"], 0.0),
    ],
)
def test_f1(said, golds, expected):
    assert squad.f1(said, golds) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [squad.exact_match, squad.f1])
def test_no_answer(measure):
    assert measure("", []) == 1.0
    assert measure("the", []) == 1.0  # nothing, once normalised
    assert measure("cat", []) == 0.0
    assert measure("", ["", "the"]) == 1.0  # answers that say nothing are none
    assert measure("", ["the", "cat"]) == 0.0  # ... and do not count beside one that does


def test_score_by_hand():
    golds = {"1": ["cat"], "2": ["big dog"], "3": [], "4": []}
    found = squad.score({"1": "The cat", "2": "dog", "3": "", "4": "bird"}, golds)
    assert found == {
        "exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3 + 1) / 4), "total": 4,
        "has_answer_exact_match": 0.5, "has_answer_f1": pytest.approx((1 + 2 / 3) / 2), "has_answer_total": 2,
        "no_answer_exact_match": 0.5, "no_answer_f1": 0.5, "no_answer_total": 2, "missing": 0,
    }  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_a_missing_prediction_is_wrong_even_where_nothing_is_right():
    found = squad.score({"1": "cat"}, {"1": ["cat"], "2": [], "3": ["dog"]})
    assert found["f1"] == found["exact_match"] == pytest.approx(1 / 3)
    assert found["missing"] == 2 and found["total"] == 3


def test_an_answer_of_articles_is_none():
    found = squad.score({"1": ""}, {"1": ["a"]})
    assert found["has_answer_total"] == 0 and found["no_answer_f1"] == 1.0
    assert not squad.has_answer(["a", "!"]) and squad.has_answer(["a", "b"])


def test_a_kind_that_is_not_there_has_no_figures():
    found = squad.score({"1": "cat"}, {"1": ["cat"]})
    assert found["no_answer_f1"] is found["no_answer_exact_match"] is None and found["no_answer_total"] == 0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="nothing to evaluate"):
        squad.score({}, {})
    with pytest.raises(DataError, match="'2', which is not in the data"):
        squad.score({"2": "x"}, {"1": ["x"]})


def test_threshold_by_hand():
    # Answered up to -1: the two with answers, right; at 3 one without, which an answer would spoil.
    found = squad.best_null_threshold([-2.0, 3.0, -1.0], [1.0, 0.0, 0.5], [True, False, True])
    assert found == (-1.0, pytest.approx(2.5 / 3))


def test_answering_none_may_be_best():
    assert squad.best_null_threshold([2.0, 3.0], [0.0, 0.0], [False, False]) == (0.0, 1.0)
    threshold, score = squad.best_null_threshold([-2.0, 3.0], [0.0, 0.0], [False, False])
    assert threshold < -2.0 and score == 1.0


def test_a_later_threshold_must_be_better_to_be_taken():
    assert squad.best_null_threshold([1.0, 2.0], [1.0, 0.0], [True, True]) == (1.0, 0.5)
    assert squad.best_null_threshold([2.0], [0.0], [True]) == (0.0, 0.0)


def test_questions_of_one_score_stand_on_one_side():
    threshold, score = squad.best_null_threshold([1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [True, False, False])
    assert (threshold, score) == (0.0, pytest.approx(2 / 3))


def test_no_questions_are_refused():
    with pytest.raises(DataError, match="no question"):
        squad.best_null_threshold([], [], [])


questions = st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans())


@settings(max_examples=60)
@given(st.lists(questions, min_size=1, max_size=8))
def test_no_threshold_is_better(rows):
    scores, values, answerable = (np.array(column) for column in zip(*rows))
    values = np.where(answerable, values, 0.0)

    def at(threshold):
        return float(np.where(scores <= threshold, values, ~answerable).mean())

    threshold, reached = squad.best_null_threshold(scores, values, answerable)
    assert reached == pytest.approx(at(threshold)) == pytest.approx(max(at(one) for one in range(-4, 4)))
