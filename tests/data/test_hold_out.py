"""The held-out share: exact wherever groups allow it, whole groups, and the same when rows are added."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_prepare import Language, run
from tunesmith.data.rows import (
    Chat,
    Judged,
    Labelled,
    PromptCompletion,
    Question,
    Ranking,
    Tagged,
    Text,
    group_key,
)
from tunesmith.data.store import hold_out
from tunesmith.errors import DataError

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=9)


def held_rows(keys, chosen):
    return int(np.isin(keys, chosen).sum())


@settings(max_examples=300, deadline=None)
@given(SIZES, st.data(), st.integers(0, 2**32 - 1))
def test_the_number_is_exact_wherever_groups_allow_it_and_else_the_nearest(sizes, data, seed):
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64) * 977, sizes)
    rows = len(keys)
    wanted = data.draw(st.integers(1, rows - 1))
    most = data.draw(st.one_of(st.just(rows), st.integers(wanted, rows)))
    count = held_rows(keys, hold_out.choose(keys, wanted, most, seed))
    sums = {sum(some) for n in range(1, len(sizes)) for some in itertools.combinations(sizes, n)}
    possible = {total for total in sums if total <= most} or {min(sizes)}
    assert abs(count - wanted) == min(abs(total - wanted) for total in possible)
    assert 0 < count < rows


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.floats(0.01, 0.99), st.integers(0, 99))
def test_the_order_of_the_rows_changes_nothing(prompts, fraction, seed):
    keys = np.array(prompts, np.uint64)
    if len(set(prompts)) < 2:
        return
    wanted = max(1, min(len(keys) - 1, round(fraction * len(keys))))
    chosen = hold_out.choose(keys, wanted, len(keys), seed)
    assert chosen.tolist() == hold_out.choose(keys[::-1], wanted, len(keys), seed).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.integers(1, 100), st.sampled_from([0.05, 0.1, 0.3]), st.integers(0, 99))
def test_of_rows_that_were_there_few_move_when_rows_are_added(rows, added, fraction, seed):
    before, after = np.arange(rows, dtype=np.uint64), np.arange(rows + added, dtype=np.uint64)
    counts = [max(1, round(fraction * len(keys))) for keys in (before, after)]
    old, new = (set(hold_out.choose(keys, n, n, seed).tolist()) for keys, n in zip((before, after), counts))
    assert [len(old), len(new)] == counts
    moved = {key for key in old ^ new if key < rows}
    fresh = {key for key in new if key >= rows}
    assert len(moved) == abs(counts[1] - counts[0] - len(fresh))  # only to make room, or to fill it


def test_ten_percent_more_rows_move_about_the_square_root_of_their_share():
    moved = []
    for seed in range(200):
        old, new = (set(hold_out.choose(np.arange(n, dtype=np.uint64), n // 20, n, seed).tolist()) for n in (2000, 2200))
        moved.append(len([key for key in old ^ new if key < 2000]))
    assert np.mean(moved) < 4 and np.max(moved) <= 12  # of 10 new ones among 110; the deviation is sqrt(200 * 0.05) = 3.1


def test_groups_are_exchanged_where_taking_what_fits_does_not_reach_the_number():
    sizes = np.array([7] * 3000 + [5] * 40)
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    for seed in range(6):
        assert held_rows(keys, hold_out.choose(keys, 3_004, len(keys), seed)) == 3_004
        assert held_rows(keys, hold_out.choose(keys, 12_006, len(keys), seed)) == 12_006  # beyond EXACT: the last groups


def test_the_choice_is_even_over_keys_and_knows_the_seed():
    keys = np.arange(20_000, dtype=np.uint64)
    one, other = hold_out.hashes(keys, 0), hold_out.hashes(keys, 1)
    assert np.array_equal(one[::-1], hold_out.hashes(keys[::-1], 0)) and (one != other).all()
    shares = (one / 2.0**64, other / 2.0**64)
    assert abs(np.corrcoef(*shares)[0, 1]) < 0.03
    assert np.abs(np.histogram(shares[0], 10, (0, 1))[0] / 2000 - 1).max() < 0.1


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SAME = [
    (Chat((user("What is  1+1?"), assistant("2"))), Chat((user("what is 1+1? "), assistant("Two.")))),
    (Chat((user("카페"), assistant("a"))), Chat((user("\u110f\u1161\u1111\u1166"), assistant("b")))),
    (PromptCompletion("Q:", " a"), PromptCompletion("q:\n", " b")),
    (Question("who?", "A text."), Question("where?", "A text.")),
    (Ranking((user("q"),), ((assistant("a"),),), (0,)), Ranking((user("q"),), ((assistant("b"),),), (0,))),
    (Judged("q", "a", True), Judged("q", "b", False)),
    (Labelled("t", label="x"), Labelled("t", label="y")),
    (Tagged("t", ((0, 1),), ("O",)), Tagged("t", ((0, 1),), ("B-X",))),
    (Text("one text"), Text("One text")),
]
DIFFERENT = [
    (Chat((user("a"), assistant("b"), user("c"), assistant("d"))), Chat((user("a"), assistant("x"), user("c"), assistant("d")))),
    (Chat(({"role": "system", "content": "s"}, user("q"), assistant("a"))), Chat((user("q"), assistant("a")))),
    (PromptCompletion("", "a"), PromptCompletion("", "b")),
    (Labelled("t", "one"), Labelled("t", "two")),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_rows_that_ask_the_same_have_one_key(one, other):
    assert group_key(one) == group_key(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_rows_that_ask_something_else_have_another_key(one, other):
    assert group_key(one) != group_key(other)


def write(path, prompts):
    rows = [{"question": prompt, "answer": f"Answer {n}."} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sides(prepared):
    """The rows of each side by number."""
    return [{split.where(index).rpartition(":")[2] for index in range(len(split))} for split in (prepared.train, prepared.eval)]


@pytest.mark.parametrize(("rows", "fraction", "held"), [(20, 0.3, 6), (100, 0.3, 30), (19, 0.5, 10), (10, 0.01, 1), (3, 0.99, 2)])
def test_exactly_the_share_is_held_out_and_printed(tmp_path, rows, fraction, held):
    prepared = run(write(tmp_path / "a.jsonl", [f"Q {n}?" for n in range(rows)]), eval={"fraction": fraction})
    assert (len(prepared.train), len(prepared.eval)) == (rows - held, held)
    assert f"held out: {held} of {rows} rows" in prepared.report.lines()


def test_equal_prompts_are_on_one_side_in_all_files_and_in_any_order(tmp_path):
    prompts = [f"Q {n % 10}?" for n in range(40)]
    first, second = write(tmp_path / "a.jsonl", prompts[:25]), write(tmp_path / "b.jsonl", [p.lower() for p in prompts[25:]])
    prepared = run(first, train=[{"path": str(first)}, {"path": str(second)}], eval={"fraction": 0.25})
    files = {"a.jsonl": prompts[:25], "b.jsonl": prompts[25:]}

    def asked(split):
        places = [split.where(index).rpartition("/")[2].split(":") for index in range(len(split))]
        return {files[name][int(row) - 1] for name, row in places}

    assert not asked(prepared.train) & asked(prepared.eval) and len(prepared.eval) == 8
    assert (
        "held out: 8 of 40 rows, in 2 groups; 10 were asked for, but rows with the same prompt stay together"
        in prepared.report.lines()
    )


def test_the_most_rows_of_an_evaluation_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"Q {n // 3}?" for n in range(60)])
    prepared = run(path, eval={"fraction": 0.5, "limit": 10})
    assert len(prepared.eval) == 9 and prepared.report.held_out.asked == 10


def test_rows_of_one_prompt_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.jsonl", ["Q?", "q? "])
    with pytest.raises(DataError, match="all 2 rows have the same prompt"):
        run(path, Language())


def test_the_held_out_files_of_users_are_split_exactly(shared):
    for name, held in (("held-out-20.jsonl", 6), ("held-out-100.jsonl", 30)):
        if not (path := shared / "cases" / name).is_file():
            pytest.skip(f"{path} is absent")
        prepared = run(path, eval={"fraction": 0.3})
        assert len(prepared.eval) == held and not set.intersection(*sides(prepared))
