"""The data sets that every Python carries."""

from __future__ import annotations

import itertools
import sys

import pytest

from tunesmith.data.check.lint_pairs import characters
from tunesmith.data.data_config import Source
from tunesmith.data.formats.columns import choose_converter
from tunesmith.data.read import builtin, library
from tunesmith.data.read.row_files import read
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import Chat, Ranking
from tunesmith.data.store.encode_source import content_hash
from tunesmith.data.text_windows import SHARED
from tunesmith.errors import DataError


@pytest.fixture
def small_library(monkeypatch):
    """The library with every fortieth of its files, and json: what holds for any library holds for it."""
    files = library._files

    def few(folder):
        return [path for number, path in enumerate(files(folder)) if number % 40 == 0 or path.parent.name == "json"]

    monkeypatch.setattr(library, "_files", few)
    library.modules.cache_clear()
    yield
    library.modules.cache_clear()


def test_rows_are_questions_with_answers(small_library):
    before = set(sys.modules)
    rows = [row for row, _ in builtin.rows("builtin:docstrings")]
    assert not {name for name in set(sys.modules) - before if not name.startswith(("encodings", "_"))}, "nothing is imported"
    assert len(rows) > 200 and len({row["instruction"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == {"instruction", "response"} and row["instruction"].endswith("?")
        assert library.SHORTEST <= len(row["response"]) <= library.LONGEST and "\n" not in row["response"]
    answers = {row["instruction"]: row["response"] for row in rows}
    assert "JSON" in answers["What does the Python function `json.dumps` do?"]


def test_modules_that_no_user_asks_about_are_left_out():
    names = library.modules().keys()
    assert len(names) > 200 and {"json", "os.path", "asyncio.queues"} & names
    assert not [name for name in names if name.partition(".")[0] in ("idlelib", "test", "this", "antigravity")]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_the_order_and_the_digest_are_always_the_same(name, small_library):
    first = list(itertools.islice(builtin.rows(name), 100))
    assert len(first) > 10 and first == list(itertools.islice(builtin.rows(name), 100))
    assert content_hash(Source(path=name)) == content_hash(Source(path=name))


@pytest.mark.parametrize("name", ["builtin:docstrings", "builtin:instructions", "builtin:tag-ko"])
def test_rows_that_share_text_are_one_group(name, small_library):
    found = {}  # letters in a row -> the first group that has them
    groups = set()
    for row, group in itertools.islice(builtin.rows(name), 400):
        texts = [row[key] if isinstance(row[key], str) else " ".join(row[key]) for key in row if key != "instruction"]
        wide = name.endswith("-ko")
        for text in texts:
            for at in range(len(text) - SHARED + 1):
                assert wide or found.setdefault(text[at : at + SHARED], group) == group is not None
        groups.add(group)
    assert len(groups) > 20


def test_each_has_a_digest_of_its_own(small_library):
    assert len({content_hash(Source(path=name)) for name in builtin.NAMES}) == len(builtin.NAMES)


@pytest.mark.parametrize("name", [name for name, (kind, _) in builtin.NAMES.items() if kind in ("docstrings", "instructions")])
def test_a_recipe_learns_from_them_as_conversations(name, small_library):
    opened = open_source(Source(path=name, limit=30))
    rows = [row for _, row in opened.rows()]
    assert len(rows) == 30 and all(isinstance(row, Chat) for row in rows) and opened.description.startswith("alpaca")


def test_the_error_for_an_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match="Did you mean `builtin:instructions-ko`"):
        read("builtin:instruction-ko")


@pytest.mark.parametrize("name", [name for name, (kind, _) in builtin.NAMES.items() if kind == "preferences"])
def test_preferences_are_turns_whose_length_does_not_predict_the_label(name):
    records = list(itertools.islice(read(name), 400))
    convert = choose_converter([tuple(record.value) for record in records], path=name, accepted=(Ranking,))
    rows = [convert(record) for record in records]
    assert len(rows) == 400 and all(isinstance(row, Ranking) and row.prompt[0]["role"] == "user" for row in rows)
    longer = sum(characters(row.answers[0]) > characters(row.answers[1]) for row in rows)
    assert 0.4 < longer / len(rows) < 0.6
