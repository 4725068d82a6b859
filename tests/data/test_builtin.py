"""The data set every Python carries."""

from __future__ import annotations

import itertools
import sys

from tunesmith.data import builtin


def test_rows_are_questions_with_answers():
    before = set(sys.modules)
    rows = list(builtin.docstrings())
    assert not {name for name in set(sys.modules) - before if not name.startswith(("encodings", "_"))}, "nothing is imported"
    assert len(rows) > 2000 and len({row["instruction"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == {"instruction", "response"} and row["instruction"].endswith("?")
        assert builtin.SHORTEST <= len(row["response"]) <= builtin.LONGEST and "\n" not in row["response"]
    answers = {row["instruction"]: row["response"] for row in rows}
    assert "JSON" in answers["What does the Python function `json.dumps` do?"]
    assert not any("`idlelib." in question or "`test." in question for question in answers)


def test_the_order_and_the_digest_are_always_the_same():
    first = list(itertools.islice(builtin.docstrings(), 300))
    assert first == list(itertools.islice(builtin.docstrings(), 300))
    assert builtin.digest() == builtin.digest()
