"""The data sets every Python carries."""

from __future__ import annotations

import itertools
import sys

import pytest

from tunesmith.data.check.lint_pairs import characters
from tunesmith.data.data_config import Source
from tunesmith.data.read import builtin, library
from tunesmith.data.read.row_files import read
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import Chat, Ranking
from tunesmith.data.store.encode_source import content_hash
from tunesmith.errors import DataError


def test_rows_are_questions_with_answers():
    before = set(sys.modules)
    rows = list(builtin.rows("builtin:docstrings"))
    assert not {name for name in set(sys.modules) - before if not name.startswith(("encodings", "_"))}, "nothing is imported"
    assert len(rows) > 2000 and len({row["instruction"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == {"instruction", "response"} and row["instruction"].endswith("?")
        assert library.SHORTEST <= len(row["response"]) <= library.LONGEST and "\n" not in row["response"]
    answers = {row["instruction"]: row["response"] for row in rows}
    assert "JSON" in answers["What does the Python function `json.dumps` do?"]
    assert not any("`idlelib." in question or "`test." in question for question in answers)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_the_order_and_the_digest_are_always_the_same(name):
    first = list(itertools.islice(builtin.rows(name), 100))
    assert first == list(itertools.islice(builtin.rows(name), 100))
    assert content_hash(Source(path=name)) == content_hash(Source(path=name))


def test_each_has_a_digest_of_its_own():
    assert len({content_hash(Source(path=name)) for name in builtin.NAMES}) == len(builtin.NAMES)


@pytest.mark.parametrize("name", [name for name, (kind, _) in builtin.NAMES.items() if kind in ("docstrings", "instructions")])
def test_a_recipe_learns_from_them_as_conversations(name):
    opened = open_source(Source(path=name, limit=30))
    rows = [row for _, row in opened.rows()]
    assert len(rows) == 30 and all(isinstance(row, Chat) for row in rows) and opened.description.startswith("alpaca")


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(DataError, match="Did you mean `builtin:instructions-ko`"):
        read("builtin:instruction-ko")


@pytest.mark.parametrize("name", [name for name, (kind, _) in builtin.NAMES.items() if kind == "preferences"])
def test_preferences_are_turns_whose_length_says_nothing(name):
    opened = open_source(Source(path=name, limit=400), (Ranking,))
    rows = [row for _, row in opened.rows()]
    assert len(rows) == 400 and all(isinstance(row, Ranking) and row.prompt[0]["role"] == "user" for row in rows)
    longer = sum(characters(row.answers[0]) > characters(row.answers[1]) for row in rows)
    assert 0.4 < longer / len(rows) < 0.6
