"""Positions of prompts and responses in a batch, in each of its three layouts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batch import preference_batch, shared_prompts
from tunesmith.data.batch.pack import PACKED, PADDED, Layout
from tunesmith.data.batch.step import Listed, Step

ROWS = [
    {"input_ids": np.array([1, 2, 3, 10, 11, 20], np.int32), "answers": np.array([3, 2, 1], np.int32)},
    {"input_ids": np.array([4, 30, 31], np.int32), "answers": np.array([1, 2], np.int32)},
    {"input_ids": np.array([40, 50, 51], np.int32), "answers": np.array([0, 1, 2], np.int32)},  # nothing in common
]
WHOLE = [[1, 2, 3, 10, 11], [1, 2, 3, 20], [4, 30, 31], [40], [50, 51]]


def test_a_packed_batch_holds_a_prefix_once_and_its_responses_continue_it():
    batch, places = shared_prompts.arrange(ROWS, Layout(packed=True, shared=True))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 10, 11, 20, 4, 30, 31, 40, 50, 51]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 0, 0, 1]]
    assert batch["segments"] == (3, 2, 1, 1, 2, 1, 2)
    assert batch["behind"] == (-1, 0, 0, -1, 3, -1, -1)
    assert set(batch) == {"input_ids", "position_ids", "segments", "behind"}
    assert [one.tolist() for one in places] == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7, 8], [9], [10, 11]]


def test_without_sharing_each_response_is_a_segment_with_its_prefix():
    batch, _ = shared_prompts.arrange(ROWS, Layout(packed=True, shared=False))
    assert batch["segments"] == (5, 4, 3, 1, 2) and "behind" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 0, 1]]


def test_padded_rows_share_no_prompt():
    batch, _ = shared_prompts.arrange(ROWS, Layout(packed=False, shared=True))  # padded rows share nothing
    assert batch["input_ids"].shape == (5, 5) and "behind" not in batch
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 3, 1, 2]


@pytest.mark.parametrize(("packed", "shared"), [(True, True), (True, False), (False, False)])
def test_in_every_layout_the_positions_of_a_response_hold_its_prefix_and_its_tokens(packed, shared):
    batch, places = shared_prompts.arrange(ROWS, Layout(packed, shared))
    ids, positions = (batch[name].numpy().reshape(-1) for name in ("input_ids", "position_ids"))
    assert [ids[one].tolist() for one in places] == WHOLE
    assert [positions[one].tolist() for one in places] == [list(range(len(one))) for one in WHOLE]
    assert ids.dtype == positions.dtype == np.int64


@pytest.mark.parametrize(("packed", "shared"), [(True, True), (True, False), (False, False)])
def test_sizes_predict_the_tokens_and_rows_of_a_batch(packed, shared):
    answers, lengths = [row["answers"] for row in ROWS], np.array([len(row["input_ids"]) for row in ROWS])
    shapes = shared_prompts.shapes(np.concatenate(answers), np.cumsum([0, *map(len, answers)]))
    tokens, rows, _ = shared_prompts.sizes(lengths, shapes, Layout(packed, shared))
    batch, _ = shared_prompts.arrange(ROWS, Layout(packed, shared))
    assert batch["input_ids"].numel() == (tokens.sum() if packed else tokens.max() * rows.sum())
    assert rows.tolist() == ([1, 1, 1] if packed else [2, 1, 2])


@given(
    lengths=st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    prefix=st.integers(1, 6),
    own=st.integers(1, 6),
    data=st.data(),
)
def test_a_shortened_row_keeps_the_end_of_the_prompt_and_the_beginning_of_each_answer(lengths, prefix, own, data):
    common, answers = lengths
    count = common + sum(answers)
    supervised = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    supervised[:common] = False
    row = {
        "input_ids": np.arange(count, dtype=np.int32),
        "supervised": supervised,
        "answers": np.array([common, *answers], np.int32),
    }
    short = preference_batch.shorten(row, prefix, own)
    wholes, shorts = shared_prompts.separate(row), shared_prompts.separate(short)
    cut = max(common - prefix, 0)
    assert [one.tolist() for one in shorts] == [one[cut : common + own].tolist() for one in wholes]
    for own_part, at in zip(short["answers"][1:], np.cumsum(short["answers"])[:-1], strict=True):
        kept = short["supervised"][at : at + own_part]
        before = supervised[short["input_ids"][at : at + own_part]]
        assert kept.tolist() == before.tolist() if before.any() else kept.all()
    assert not short["supervised"][: short["answers"][0]].any() and row["answers"][0] == common


def row(*ids, answer=3):
    """A row whose last ``answer`` tokens are supervised."""
    return {"input_ids": np.array(ids, np.int32), "supervised": np.arange(len(ids)) >= len(ids) - answer}


PROMPTS = st.lists(st.lists(st.integers(1, 2), max_size=6), min_size=1, max_size=7)


@given(PROMPTS)
def test_no_families_of_prompts_save_more_tokens(prompts):
    """At least as many as any cut of the sorted prompts, and at most as many as any division into families."""

    def divisions(items):
        if not items:
            yield []
            return
        first, *rest = items
        for division in divisions(rest):
            yield [[first], *division]
            for place in range(len(division)):
                yield [*division[:place], [first, *division[place]], *division[place + 1 :]]

    def cuts(items):
        yield [items]
        for place in range(1, len(items)):
            yield from ([items[:place], *cut] for cut in cuts(items[place:]))

    def common(family):
        equal = [len(set(tokens)) == 1 for tokens in zip(*family, strict=False)]
        return equal.index(False) if False in equal else len(equal)

    shared = shared_prompts.prefixes([np.array(prompt, np.int32) for prompt in prompts])
    families = {}
    for prompt, tokens in zip(prompts, shared, strict=True):
        assert tokens <= len(prompt)
        families.setdefault(tuple(prompt[:tokens]), []).append(prompt)
    saved = sum(len(beginning) * (len(members) - 1) for beginning, members in families.items())
    best = max(sum(common(family) * (len(family) - 1) for family in division) for division in divisions(prompts))
    ordered = sorted(prompts)
    adjacent = max(sum(common(family) * (len(family) - 1) for family in cut) for cut in cuts(ordered))
    assert adjacent <= saved <= best


def test_a_beginning_ends_before_the_token_that_predicts_the_first_target():
    """Each row has its own last token of the prompt, so no position has two targets."""
    rows = [row(1, 2, 3, 4, 7, 8, 9), row(1, 2, 3, 4, 5, 8, 9), row(6, 5, 4, 3, 2, 1, 9)]
    assert shared_prompts.beginnings(rows) == [3, 3, 0]
    assert shared_prompts.beginnings(rows[1:]) is None, "nothing in common"
    long = [row(1, 2, *range(10, 60)), row(1, 2, *range(60, 110))]
    assert shared_prompts.beginnings(long) is None, "2 of 104 tokens"
    assert shared_prompts.beginnings([row(1, answer=1), row(1, answer=1)]) is None, "rows without a target"


def test_rows_of_a_step_hold_their_beginning_once():
    rows = [row(1, 2, 3, 4, 7, 8, 9), row(6, 5, 4, 3, 2, 1, 9), row(1, 2, 3, 4, 5, 8)]
    step = Step(1, Listed(rows, ["a", "b", "c"]), np.arange(3), shared_prompts.with_targets).sharing_beginnings()
    [places] = step.groups(range(3), 100, PACKED)
    assert places == [0, 2, 1] and step.names(places) == ["a", "c", "b"], "neighbours share"
    micro = step.micro(places, PACKED)
    assert micro.tokens == micro.batch["input_ids"].numel() == 18 and sum(micro.lengths) == 20
    assert micro.batch["behind"] == (-1, 0, 0, -1)
    labels = micro.batch["labels"].tolist()
    assert labels == [7, 8, 9, 4, 5, 8, 2, 1, 9] and micro.batch["lengths"] == [3, 3, 3]
    before = micro.batch["input_ids"][0, micro.batch["positions"]].tolist()
    assert before == [4, 7, 8, 3, 4, 5, 3, 2, 1], "each target is predicted by the token before it"
    padded = step.micro([0, 1, 2], PADDED)
    assert padded.tokens == 21 and padded.batch["input_ids"].shape == (3, 7)


def test_neighbours_with_other_beginnings_do_not_share():
    rows = [{**row(*ids), "shared": np.array([2])} for ids in ((1, 2, 7, 8, 9), (3, 4, 7, 8, 9), (3, 4, 5, 8, 9))]
    batch = shared_prompts.with_targets(rows, PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 7, 8, 9, 3, 4, 7, 8, 9, 5, 8, 9]]
