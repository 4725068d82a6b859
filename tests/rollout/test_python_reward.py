"""A reward that is a Python function: found, checked before weights are loaded, and its faults named."""

from __future__ import annotations

import sys

import pytest

from tests.rollout.completions import answered
from tests.tiny import tiny_tokenizer
from tunesmith.errors import RecipeError, RewardError
from tunesmith.rollout.python_reward import PythonReward
from tunesmith.rollout.rewards import Rewards

MODULE = """
from helper_of_rewards import SCALE
import numpy

def brevity(prompts, completions, rows, scale=1):
    return [-scale * SCALE * len(text) for text in completions]

def graded(prompts, completions, rows):
    return [float(row["target"] in text) for text, row in zip(completions, rows)]

def seen(prompts, completions, rows):
    SEEN.append((prompts, completions, rows))
    rows[0]["changed"] = True
    return numpy.ones(len(rows), dtype="float32")

SEEN = []

def short(prompts, completions, rows):
    return [1.0]

def missing(prompts, completions, rows):
    return [1.0, float("nan")]

def words(prompts, completions, rows):
    return [1.0, "good"]

def nothing(prompts, completions, rows):
    return None

def one(prompts, completions, rows):
    return 1.0

def huge(prompts, completions, rows):
    return [0, 10**400]

def fails(prompts, completions, rows):
    return [1 / len(rows[0]["none"])]

def two(prompts, completions):
    return []

async def later(prompts, completions, rows):
    return [0.0]

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "helper_of_rewards.py").write_text("SCALE = 2\n")
    (tmp_path / "broken_rewards.py").write_text("import math\nx = 1 / 0\n")
    (tmp_path / "unfinished_rewards.py").write_text("def f(:\n")
    (tmp_path / "unmet_rewards.py").write_text("import no_such_library\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_rewards", "helper_of_rewards"):
        sys.modules.pop(name, None)


def rewards(folder, call, **keys):
    return Rewards([PythonReward(call=call, folder=str(folder), **keys)], tiny_tokenizer())


TWO = [answered("a", target="a"), answered("bcd", target="x")]


def test_the_function_gets_its_arguments_and_scores(folder):
    assert rewards(folder, "my_rewards:brevity").score(TWO).total.tolist() == [-2, -6]
    scored = rewards(folder, "my_rewards:brevity", args={"scale": 3}, weight=0.5).score(TWO)
    assert scored.total.tolist() == [-3, -9] and {name: x.tolist() for name, x in scored.by_name.items()} == {
        "brevity": [-6, -18]
    }
    assert rewards(folder, "my_rewards:graded").score(TWO).total.tolist() == [1, 0]


def test_prompts_are_texts_or_turns_and_rows_are_copies(folder):
    turns = ({"role": "user", "content": "안녕"},)
    answers = [answered("x", prompt="q", level=1), answered("y", prompt=turns)]
    assert rewards(folder, "my_rewards:seen").score(answers).total.tolist() == [1, 1]
    prompts, texts, rows = sys.modules["my_rewards"].SEEN[-1]
    assert (prompts, texts) == (["q", [{"role": "user", "content": "안녕"}]], ["x", "y"])
    assert rows[0]["changed"] and answers[0].row.columns == {"level": 1}


def test_the_working_directory_is_searched_too(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    assert Rewards([PythonReward(call="my_rewards:brevity")], tiny_tokenizer()).score(TWO).total.tolist() == [-2, -6]


REFUSED = [
    ("no_rewards:f", "there is no module 'no_rewards' in .*\n.*no_rewards.py"),
    ("my_rewards:brevty", "has no function 'brevty'. Did you mean `brevity`"),
    ("my_rewards:NUMBER", "expected my_rewards:NUMBER to be a function that returns numbers, it is a int"),
    ("my_rewards:later", "it is an async function"),
    ("my_rewards:two", "cannot be called as f\\(prompts, completions, rows\\)"),
    ("broken_rewards:f", r"broken_rewards cannot be imported \(broken_rewards.py, line 2\): ZeroDivisionError"),
    ("unfinished_rewards:f", r"\(unfinished_rewards.py, line 1\): SyntaxError"),
    ("unmet_rewards:f", r"unmet_rewards cannot be imported \(unmet_rewards.py, line 1\): No module named 'no_such_library'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_called_is_refused_before_anything_is_loaded(folder, call, message):
    with pytest.raises(RecipeError, match=message) as caught:
        rewards(folder, call)
    assert "objective.rewards.0" in str(caught.value) and caught.value.exit_code == 2


def test_an_argument_that_the_function_lacks_is_refused(folder):
    with pytest.raises(RecipeError, match=r"rows, skale=\.\.\..*unexpected keyword argument 'skale'"):
        rewards(folder, "my_rewards:brevity", args={"skale": 2})


FAULTS = [
    ("short", "reward short: expected 2 numbers, one for each answer, got 1"),
    ("missing", "reward missing: expected a finite number for each answer, got .*nan for rollout:0:0: 'bcd'"),
    ("words", "reward words: expected a finite number for each answer, got 'good'"),
    ("nothing", "reward nothing: expected a list of 2 numbers, one for each answer, got NoneType"),
    ("one", "reward one: expected a list of 2 numbers, one for each answer, got float"),
    ("huge", "reward huge: expected a finite number"),
    ("fails", r"my_rewards:fails failed \(my_rewards.py, line \d+\): KeyError: 'none'"),
]


@pytest.mark.parametrize(("name", "message"), FAULTS)
def test_a_function_that_returns_no_scores_stops_the_run(folder, name, message):
    with pytest.raises(RewardError, match=message) as caught:
        rewards(folder, f"my_rewards:{name}").score(TWO)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("call", ["my_rewards", "my_rewards.brevity", ":brevity", "my rewards:brevity", "a:b:c"])
def test_a_call_has_a_module_and_a_function(call):
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        PythonReward(call=call)
