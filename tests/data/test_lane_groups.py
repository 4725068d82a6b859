"""How examples are grouped for lanes, and which micro-batches run alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batch import lane_groups
from tunesmith.data.batch.shared_prompts import Families, Sizes

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=25)


def sizes(lengths, families=None):
    """``families``: (number, first tokens that its members share) of each."""
    numbers = None if families is None else Families(*(np.array(column) for column in zip(*families, strict=True)))
    return Sizes(np.array(lengths), np.ones(len(lengths), int), numbers)


@given(lengths=LENGTHS, share=st.integers(1, 120), lanes=st.integers(2, 3), data=st.data())
def test_every_example_is_in_one_group_that_its_lane_can_hold(lengths, share, lanes, data):
    number = st.integers(0, 3).map(lambda family: (family, min(9 * family, min(lengths))))
    families = data.draw(st.none() | st.lists(number, min_size=len(lengths), max_size=len(lengths)))
    groups = lane_groups.balanced(sizes(lengths, families), share, lanes)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        own = sum(lengths[index] - (families[index][1] if families else 0) for index in group)
        once = sum(tokens for _, tokens in {families[index] for index in group}) if families else 0
        assert len(group) == 1 or own + once <= share
    assert all(groups), "a group is empty"


def test_groups_are_a_multiple_of_the_lanes_and_about_equal():
    groups = lane_groups.balanced(sizes([100, 90, 80, 70, 60, 50, 40, 30]), 300, 2)
    assert [sum([100, 90, 80, 70, 60, 50, 40, 30][index] for index in group) for group in groups] == [260, 260]


def test_what_a_family_begins_with_counts_once_in_each_group():
    """Eight rows that begin alike: without that, the two groups would have 260 tokens each."""
    alike = sizes([100, 90, 80, 70, 60, 50, 40, 30], [(0, 20)] * 8)
    groups = lane_groups.balanced(alike, 200, 2)
    assert [alike.packed(group) for group in groups] == [200, 200]


@given(lengths=LENGTHS, budget=st.integers(1, 150), lanes=st.integers(2, 3))
def test_what_runs_at_the_same_time_is_within_the_budget(lengths, budget, lanes):
    tokens = sorted(lengths, reverse=True)
    alone = lane_groups.count_alone(tokens, budget, lanes)
    assert alone == len(tokens) or sum(tokens[alone : alone + lanes]) <= budget
    assert alone == 0 or alone == len(tokens) or sum(tokens[alone - 1 : alone - 1 + lanes]) > budget
    shares = lane_groups.shared_out(tokens[alone:], lanes)
    firsts = [tokens[alone + share[0]] for share in shares if share]
    assert alone == len(tokens) or sum(firsts) <= budget
    assert all(list(share) == sorted(share) for share in shares)


def test_turns_follow_the_tokens_that_a_lane_has_done():
    assert lane_groups.turns([50, 40, 30, 20], [[0], [1, 2], [3]]) == [3, 1, 0, 2]
    assert lane_groups.turns([9, 9, 9, 9], [[0, 2], [1, 3]]) == [0, 1, 2, 3]


def test_without_lanes_every_micro_batch_runs_alone():
    assert lane_groups.count_alone([5, 9], 100, 1) == 2
    assert lane_groups.count_together([5, 9], 100, 1) == 1
    assert lane_groups.count_together([9, 5], 100, 2) == 2
    assert lane_groups.count_together([9, 5], 10, 2) == 1
