import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith.cli.main import main

OUTCOME = {
    "figures": ["eval_loss", "perplexity"],
    "eval_loss_before": 2.5,
    "eval_loss": 2.0,
    "perplexity_before": 12.18,
    "perplexity": 7.39,
    "tokens_per_second": 512.3,
    "peak_memory_bytes": 2**30,
    "trainable_parameters": 1000,
    "total_parameters": 100_000,
    "model_dir": "runs/r/model",
    "run_dir": "runs/r",
    "report": "runs/r/report.html",
    "steps": 12,
    "samples": [{"prompt": "Say [b]hi", "before": "bye", "after": "hi", "reference": None}],
    "stopped": None,
}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Run `tunesmith train` with a training that returns OUTCOME. Returns (exit code, arguments of the training)."""
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata:\n  train: [{path: x.json}]\n")
    monkeypatch.chdir(tmp_path)

    def run(*options, outcome=OUTCOME):
        calls = []
        fake = SimpleNamespace(train=lambda recipe, **keys: calls.append((recipe, keys)) or outcome)
        monkeypatch.setattr(importlib.import_module("tunesmith.train"), "run", fake, raising=False)
        return main(["train", str(path), *options]), calls

    return run


def test_the_engine_gets_the_checked_recipe(trained):
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/recipe.yaml").write_text("")
    Path("runs/x/manifest.json").write_text("{}")
    code, [(recipe, keys)] = trained("train.epochs=2", "data.train=[{path: y.json}]", "--resume", "--out", "runs/x")
    assert code == 0
    assert (recipe.train.epochs, recipe.data.train[0].path) == (2, "y.json")
    assert (keys["out"].path, keys["resume"], keys["restart"]) == (Path("runs/x").resolve(), True, False)


def test_the_run_is_named_after_the_recipe(trained):
    _, [(_, keys)] = trained()
    assert keys["out"].path == Path("runs/r").resolve() and not Path("runs/r").exists()


def test_json_carries_the_whole_outcome(trained, capsys):
    trained("--json")
    assert json.loads(capsys.readouterr().out) == OUTCOME


def test_summary_shows_before_and_after_and_the_next_command(trained, capsys):
    trained()
    caught = capsys.readouterr()
    for words in (
        "2.5000",
        "2.0000",
        "12.18",
        "7.39",
        "Say [b]hi",
        "bye",
        "1.00%",
        "runs/r/report.html",
        "tunesmith generate runs/r/model",
    ):
        assert words in caught.out, words
    assert "learning_rate 0.0002" in caught.err


def test_the_next_command_can_be_pasted(trained, capsys):
    trained(outcome={**OUTCOME, "model_dir": "runs/a b/model"})
    assert "tunesmith chat 'runs/a b/model'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (
            "Return the sum.",
            "better than before: 1 of 1 are nearer to the reference (mean F1 of the words in common: 0.00 before,",
        ),
        ("sure", "not better than before: 0 of 1 are nearer to the reference (mean F1 of the words in common: 0.00 before, 0.00"),
    ],
)
def test_the_summary_shows_whether_answers_became_better(trained, capsys, after, line):
    sample = {"prompt": "What does `sum` do?", "before": "Sure!", "after": after, "reference": "Return the sum of all."}
    trained(outcome={**OUTCOME, "samples": [sample]})
    assert f"answers    {line}" in capsys.readouterr().out.replace("\n", " ")


def test_summary_without_held_out_rows(trained, capsys):
    empty = {**OUTCOME, "eval_loss": None, "eval_loss_before": None, "perplexity": None, "samples": [], "stopped": "max_steps"}
    code, _ = trained(outcome=empty)
    assert code == 0
    out = capsys.readouterr().out
    assert "held-out" not in out and "max_steps" in out


def test_a_wrong_recipe_starts_nothing(trained, capsys):
    code, calls = trained("train.epoch=2")
    assert (code, calls) == (2, [])
    assert "Did you mean `epochs`?" in capsys.readouterr().err
