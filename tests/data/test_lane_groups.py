"""How examples are grouped for lanes, and which micro-batches run alone."""

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batch import lane_groups

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=25)


@given(lengths=LENGTHS, share=st.integers(1, 120), lanes=st.integers(2, 3))
def test_every_example_is_in_one_group_that_its_lane_can_hold(lengths, share, lanes):
    groups = lane_groups.balanced(lengths, share, lanes)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[index] for index in group) <= share for group in groups)
    assert all(groups), "a group is empty"


def test_groups_are_a_multiple_of_the_lanes_and_about_equal():
    groups = lane_groups.balanced([100, 90, 80, 70, 60, 50, 40, 30], 300, 2)
    assert [sum([100, 90, 80, 70, 60, 50, 40, 30][index] for index in group) for group in groups] == [260, 260]


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
