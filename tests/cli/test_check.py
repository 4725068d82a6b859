import importlib
import json
from types import SimpleNamespace

import pytest

from tunesmith.cli.main import main

SPLIT = {
    "rows": 1200,
    "examples": 1200,
    "tokens": 2000,
    "supervised_tokens": 500,
    "unlearnable": 0,
    "unlearnable_first": [],
    "overlong": {"policy": "drop", "rows": 0, "tokens_lost": 0},
    "duplicates": 0,
    "histogram": {"median": 58.5, "max": 300},
}
FOUND = {
    "model": "m",
    "objective": {"type": "sft", "train_on": "completion", "expand_turns": False},
    "adaptation": {"type": "full"},
    "data": {
        "sources": [
            {
                "path": "a.json",
                "format": "alpaca",
                "rows_kept": 1260,
                "rows_rejected": 1,
                "problems": ["a.json:3: empty"],
                "left_out": {"looked_at": 200, "rows": 1, "first": ["a.json:9:tools: all 2 of them"]},
            }
        ],
        "train": {**SPLIT, "unlearnable": 2, "unlearnable_first": ["a.json:5"], "duplicates": 3},
        "eval": {**SPLIT, "overlong": {"policy": "drop", "rows": 1, "tokens_lost": 40}},
        "eval_sets": {"korean": {**SPLIT, "rows": 7}},
        "contaminated": {
            "letters": 60,
            "rows": 2,
            "share": 0.02,
            "answers": 1,
            "short": 0,
            "first": [{"where": "e.json:1", "same_as": "a.json:7", "text": "many words"}],
        },
        "template": "its own",
        "duplicates_train_eval": 4,
        "held_out": {"rows": 30, "asked": 30, "of": 100, "groups": 30, "digest": "0"},
    },
    "max_length": 300,
    "notes": [],
    "steps": 150,
    "steps_per_epoch": 150,
    "learning_rate": 2e-5,
    "trainable_parameters": 10,
    "total_parameters": 1000,
    "trainable_percent": 1.0,
    "precision": {"compute": "fp32", "why": "asked for", "trained_weights": "fp32", "frozen_weights": "bf16"},
}


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.import_module("tunesmith.train"), "run", SimpleNamespace(check=lambda recipe: FOUND), raising=False
    )
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata:\n  train: [{path: x.json}]\n")
    return str(path)


def test_json(recipe, capsys):
    assert main(["check", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == FOUND


def test_figures_for_people(recipe, capsys):
    assert main(["check", recipe]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "model m",
        "objective sft: train_on completion",
        "adaptation full",
        "source a.json: alpaca; 1,260 rows, 1 rejected",
        "a.json:3: empty",
        "the template leaves out a.json:9:tools: all 2 of them",
        "held out: 30 of 100 rows",
        "train 1,200 rows, 2,000 tokens, 500 supervised (25.0%); median 58.5, longest 300",
        "train 2 rows have no supervised tokens, the first: a.json:5",
        "train 3 rows repeat another",
        "eval 1,200 rows, 2,000 tokens, 500 supervised (25.0%); median 58.5, longest 300",
        "eval 1 rows are over max_length (drop): 40 tokens lost",
        "korean: 7 rows, 2,000 tokens, 500 supervised (25.0%); median 58.5, longest 300",
        "4 rows are in both train and eval",
        "2 eval rows (2.0%) share a passage of 60 letters or more (20 Hangul syllables or ideographs) with a training row, 1 of them in supervised tokens:",
        "e.json:1 and a.json:7: 'many words'",
        "template its own",
        "max_length 300 tokens",
        "steps 150, 150 an epoch; learning rate 2e-05",
        "parameters 10 trained of 1,000 (1.00%)",
        "precision fp32 (asked for)",
        "trained weights fp32, frozen weights bf16",
    ]


def test_a_wrong_recipe_is_exit_2(recipe):
    assert main(["check", recipe, "objective=nope"]) == 2
