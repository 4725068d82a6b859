"""Running mean and deviation of rewards against NumPy, clipping, and the state of a checkpoint."""

import json

import numpy as np
import pytest

from tunesmith.rollout.reward_scale import RewardScale

BATCHES = [np.array([1.0, 2.0, 4.0]), np.array([1e6 + 1]), np.array([]), np.array([-3.0, 0.5])]


def test_statistics_equal_those_of_all_rewards_so_far():
    scale = RewardScale("mean_std")
    for number, batch in enumerate(BATCHES, 1):
        scaled = scale(batch)
        seen = np.concatenate(BATCHES[:number])
        assert (scale.count, scale.mean) == (len(seen), pytest.approx(seen.mean(), rel=1e-14))
        assert scale.std == pytest.approx(seen.std(ddof=1), rel=1e-12)
        assert scaled == pytest.approx((batch - seen.mean()) / seen.std(ddof=1), rel=1e-12)


def test_std_keeps_the_mean_and_clip_limits_the_result():
    rewards = np.array([1.0, 2.0, 4.0, -50.0])
    assert RewardScale("std")(rewards) == pytest.approx(rewards / rewards.std(ddof=1), rel=1e-14)
    assert RewardScale(clip=3.0)(rewards).tolist() == [1, 2, 3, -3]
    assert RewardScale()(rewards).tolist() == rewards.tolist()


def test_equal_rewards_are_not_divided_by_zero():
    assert RewardScale("mean_std")(np.array([2.0, 2.0])).tolist() == [0, 0]
    assert RewardScale("std")(np.array([5.0])).tolist() == [5]


def test_a_restored_state_continues_bit_for_bit():
    whole, resumed = RewardScale("mean_std", 2.0), RewardScale("mean_std", 2.0)
    whole(BATCHES[0])
    resumed.load(json.loads(json.dumps(whole.state())))
    assert np.array_equal(whole(BATCHES[3]), resumed(BATCHES[3])) and whole.state() == resumed.state()
