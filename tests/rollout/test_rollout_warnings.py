"""Each warning on figures that deserve it, and none on a healthy run."""

import re

import pytest

from tunesmith.rollout import rollout_warnings
from tunesmith.rollout.rollout_warnings import find

KEY = "objective.kl_coef"


def figures(**changes):
    """Eight iterations of a healthy run; a change names a figure and its values in the second half."""
    made = []
    for number in range(8):
        one = {
            "reward": 0.1 * number, "reward_stderr": 0.01, "entropy": 2.0 - 0.1 * number, "response_length": 20.0 + number,
            "stopped": 0.8, "kl_per_answer": 0.2 * number, "length_variance": 4.0, "length_covariance": 0.1,
            "eval_reward": 0.1 * number, "eval_reward_stderr": 0.02,
        }  # fmt: skip
        made.append(one | (changes if number >= 4 else {}))
    return made


CASES = {
    "truncated": ({"stopped": 0.0}, "cut at objective.max_new_tokens"),
    "collapsed": ({"entropy": 0.2}, r"entropy fell from 1.85 to 0.2 nats a token: .* Raise objective.kl_coef"),
    "drifted": ({"response_length": 60.0, "length_covariance": -0.1}, "answers grew from 22 to 60 tokens"),
    "pays_for_length": (
        {"response_length": 32.0, "length_covariance": 0.9},
        r"rose by 0\.4 and the answers' length changed by \+10\.5 tokens. At equal length the reward fell by 0\.91\d: .*{type: length, ",
    ),
    "falls_on_held_out": (
        {"eval_reward": 0.1},
        r"rose from 0\.15 to 0\.55, and that of the held-out prompts fell from 0\.3 to 0\.1: .* raise objective\.kl_coef",
    ),
    "diverging": (
        {"reward": 0.1},
        r"from 0.3 to 1.1 nats, and the reward did not rise \(0.15 to 0.1\)\. Raise objective.kl_coef",
    ),
}


def test_a_healthy_run_has_no_warning():
    history = figures()
    assert all(find(history[:number], KEY) == {} for number in range(1, 9))


@pytest.mark.parametrize("name", CASES)
def test_a_warning_names_what_it_saw_and_the_key(name):
    changes, text = CASES[name]
    found = find(figures(**changes), KEY)
    assert set(found) == {name}
    assert re.search(text, found[name])


def test_every_warning_has_a_case():
    assert set(CASES) == set(rollout_warnings.WARNINGS)


def test_shorter_answers_are_reported_too():
    assert "shrank from 22 to 5" in find(figures(response_length=5.0), KEY)["drifted"]


def test_a_run_without_a_reference_is_not_judged_by_its_divergence():
    history = [{name: value for name, value in one.items() if name != "kl_per_answer"} for one in figures(reward=0.0)]
    assert find(history, KEY) == {}


def test_a_reward_of_length_alone_is_no_fall_at_equal_length():
    """Every token is worth 0.05, within an iteration and between iterations."""
    history = [one | {"reward": 0.05 * one["response_length"], "length_covariance": 0.2} for one in figures(response_length=40.0)]
    assert find(history, KEY) == {}


def test_answers_of_one_length_have_no_slope():
    assert find(figures(length_variance=0.0, length_covariance=0.0), KEY) == {}


def test_a_run_without_held_out_prompts_is_not_judged_by_them():
    history = [{name: value for name, value in one.items() if not name.startswith("eval")} for one in figures()]
    assert find(history, KEY) == {}


def test_an_evaluation_within_its_noise_is_no_fall():
    assert find(figures(eval_reward=0.28), KEY) == {}


def test_few_iterations_are_no_trend():
    assert find(figures(entropy=0.01, response_length=90.0, reward=0.0)[3:6], KEY) == {}
