"""The mix of rewards: names, weights, columns, and the list in a recipe."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.rollout.completions import answered
from tests.rollout.sampling import made as made_run
from tests.tiny import tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Prompt
from tunesmith.errors import RecipeError
from tunesmith.models.load import load
from tunesmith.recipe import text as recipe_text
from tunesmith.rollout.rewards import Reward, Rewards
from tunesmith.train import session

LISTED = TypeAdapter(list[Reward])


def made(*items):
    return Rewards(LISTED.validate_python(list(items), strict=True), tiny_tokenizer())


def test_the_total_is_the_weighted_sum_and_each_reward_keeps_its_name():
    rewards = made(
        {"type": "length", "target": 4, "weight": 0.5},
        {"type": "final_stop", "name": "done"},
        {"type": "regex", "pattern": "a", "weight": -2},
    )
    scored = rewards.score([answered("a", tokens=3), answered("b", tokens=6, stopped=False)])
    assert {name: values.tolist() for name, values in scored.by_name.items()} == {
        "length": [-1, -2], "done": [1, 0], "regex": [1, 0],
    }  # fmt: skip
    assert scored.total.tolist() == [-0.5 + 1 - 2, -1] and scored.total.dtype == np.float64


def test_no_answers_have_no_scores():
    scored = made({"type": "final_stop"}).score([])
    assert scored.total.shape == scored.by_name["final_stop"].shape == (0,)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "expected at least one reward"),
        ([{"type": "final_stop"}, {"type": "final_stop"}], r"objective\.rewards\.0: 'final_stop' is the name of two rewards"),
        ([{"type": "final_stop", "name": "reward"}], "the sum of all rewards"),
    ],
)
def test_names_must_differ(items, message):
    with pytest.raises(RecipeError, match=message):
        made(*items)


def test_a_function_called_like_the_sum_has_the_name_of_its_type(tmp_path, monkeypatch):
    """So has a reward model in a folder `reward`, such as the stage of recipes/rlhf/pipeline.yaml."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "like_the_sum.py").write_text("def reward(prompts, completions, rows): return [1.0] * len(prompts)\n")
    assert made({"type": "python", "call": "like_the_sum:reward", "folder": str(tmp_path)}).names == ("python",)


@pytest.mark.parametrize(
    "item",
    [{"type": "lenght", "target": 3}, {"target": 3}, {"type": "length", "target": "3"}, {"type": "length", "target": True}],
)
def test_an_item_that_is_no_reward_is_refused(item):
    with pytest.raises(ValidationError):
        LISTED.validate_python([item], strict=True)


def test_rows_must_have_the_columns_that_rewards_read():
    rewards = made({"type": "exact", "column": "answer"}, {"type": "contains", "text": "x"})
    rewards.check_rows([Prompt("q", {"answer": "a"})])
    with pytest.raises(
        RowFault, match="expected a column 'answer', which the reward exact reads, got the columns 'answr'"
    ) as caught:
        rewards.check_rows([Prompt("q", {"answer": "a"}), Prompt("q", {"answr": "a"})])
    assert (caught.value.index, caught.value.field) == (1, "answer")


def test_the_example_of_the_page_scores(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (recipe,), (code,) = (
        re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE) for language in ("yaml", "python")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_rewards.py").write_text(code)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    items = LISTED.validate_python(recipe_text.read(recipe, "page")[0]["objective"]["rewards"], strict=True)
    rewards = Rewards([item for item in items if item.name != "helpful"], tiny_tokenizer())  # there is no runs/rm here
    turns = ({"role": "user", "content": "How many?"},)
    answers = [answered("#### 7", answer="#### 7"), answered("How many? " + "x" * 190, prompt=turns, stopped=False, answer="7")]
    scored = rewards.score(answers)
    assert {name: values.tolist() for name, values in scored.by_name.items()} == {
        "length": [0, 0], "final_stop": [1, 0], "exact": [1, 0], "brevity": [pytest.approx(1 - 6 / 200 + 1), -0.5],
    }  # fmt: skip
    assert scored.total == pytest.approx([0.5 + 1 + 0.197, -0.05])


def test_the_resolved_recipe_makes_the_same_rewards():
    items = LISTED.validate_python([{"type": "length", "max": 30, "unit": "words"}, {"type": "contains", "text": ["a"]}])
    assert LISTED.validate_python(LISTED.dump_python(items, mode="json"), strict=True) == items


REFUSED = [
    ({"type": "ppo", "adaptation": "features"}, None, "adaptation: features freezes the body, .* Set adaptation: lora"),
    (
        {"decode_weights": "int8"},
        None,
        "decode_weights int8 is not a key of a run that learns .* Remove objective.decode_weights",
    ),
    ({"type": "ppo", "decode_weights": "int8"}, None, "decode_weights int8 is not a key of a run that learns from its samples"),
    ({"max_new_tokens": 0}, None, "`objective.max_new_tokens`: expected greater than 0, got 0"),
    ({"rewards": [{"type": "length", "traget": 3}]}, None, "unknown key `objective.rewards.0.traget`. Did you mean `target`"),
    ({"rewards": [{"type": "final_stop", "lr": 1}]}, None, "unknown key `objective.rewards.0.lr`. Valid: name, type, weight"),
    ({"rewards": [{"type": "length", "max": 3, "beta": 1}]}, None, "unknown key `objective.rewards.0.beta`. Valid: max, name"),
    ({"rewards": [{"type": "python", "call": "no_such_module:f"}]}, None, "objective.rewards.0.call: there is no module"),
    ({"rewards": [{"type": "model", "path": "BASE"}]}, None, "objective.rewards.0.path: .*no head that scores a text"),
    ({"rewards": [{"type": "exact", "column": "answer"}]}, None, "prompts.jsonl:1:answer.*which the reward exact reads"),
    ({"rewards": [{"type": "final_stop"}, {"type": "final_stop"}]}, None, "the name of two rewards"),
    ({"rewards": []}, None, "at least one reward"),
    ({}, [{"prompt": "q"}, {"prompt": " "}], "prompts.jsonl:2:prompt.*only spaces"),
    ({}, [{"prompt": "q"}, {"prompt": "word " * 600}], "prompts.jsonl:2:row.*expected a prompt of at most 506 tokens"),
]


@pytest.mark.parametrize(("objective", "rows", "message"), REFUSED)
def test_bad_input_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, capsys, objective, rows, message):
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    keys = made_run(tmp_path, **objective)
    for item in keys["objective"]["rewards"]:
        item |= {"path": keys["model"]} if item.get("path") == "BASE" else {}
    if rows:
        Path(keys["data"]["train"][0]["path"]).write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text.dump(keys))
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split())), message
    assert not (tmp_path / "run").exists()


def test_a_function_that_fails_in_a_run_costs_no_answer(tmp_path, monkeypatch, capsys):
    """Exit code 3, with the state saved and the next command; once it is corrected, the run goes on."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = tmp_path / "counts_words.py"
    module.write_text("def words(prompts, completions, rows):\n    return [float('nan')] * len(prompts)\n")
    keys = made_run(tmp_path, rewards=[{"type": "python", "call": "counts_words:words"}], train={"max_steps": 2, "epochs": 1.0})
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text.dump(keys))
    command = ["train", str(file), "--out", str(tmp_path / "run")]
    assert main(command) == 3
    shown = " ".join(capsys.readouterr().err.split())
    assert "reward words: expected a finite number for each answer, got" in shown
    assert "The answers are saved: their scoring is repeated with --resume. Correct the reward first" in shown
    module.write_text("def words(prompts, completions, rows):\n    return [float(len(one.split())) for one in completions]\n")
    monkeypatch.delitem(sys.modules, "counts_words")
    monkeypatch.setattr(session.RunSession, "sample", lambda *arguments: pytest.fail("answers were sampled again"))
    assert main([*command, "--resume"]) == 0
