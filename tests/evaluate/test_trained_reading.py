"""A saved model remembers how its training read its rows, and with which objective and reference."""

import json

import pytest

import tunesmith
from tests.runs import preferences, recipe
from tunesmith.cli.main import main
from tunesmith.errors import ModelError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, data file) of a model trained on rows with columns of their own, with context."""
    folder = tmp_path_factory.mktemp("columns")
    made = recipe(folder, max_steps=1)
    rows = [{"frage": f"which {n}?", "absatz": f"it was {n}", "antwort": 1000 + n} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"instruction": "frage", "input": "absatz", "output": "antwort"}
    made["data"]["train"][0] |= {"columns": columns, "numbers_as_text": True}
    made["data"]["eval"] = {"path": str(folder / "rows.jsonl")}
    made["train"]["eval_steps"] = 1
    found = tunesmith.train(made, out=folder / "run")
    return folder / "run", folder / "rows.jsonl", found


def test_generate_reads_a_file_as_training_did_without_flags(run, tmp_path, capsys):
    folder, data, _ = run
    out = tmp_path / "answers.jsonl"
    assert main(["generate", str(folder), "--data", str(data), "--max-new-tokens", "2", "--out", str(out)]) == 0
    first = json.loads(out.read_text().splitlines()[0])
    assert first["prompt"] == "which 0?\n\nit was 0" and first["reference"] == "1000" and "answer" in first
    assert "6 prompts, 6 with an answer to compare" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "who?", "answer": "she"}\n')
    assert main(["generate", str(folder), "--data", str(other), "--max-new-tokens", "2", "--json"]) == 0
    (answered,) = json.loads(capsys.readouterr().out)["answers"]
    assert answered["prompt"] == "who?" and answered["reference"] == "she"


def test_evaluate_reads_a_file_as_training_did_without_flags(run):
    folder, data, found = run
    again = tunesmith.evaluate(folder, data, precision="fp32")
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto", {"type": "dpo", "loss_type": "simpo", "beta": 2.0}])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_preferences_are_evaluated_with_the_figures_of_their_run(tmp_path, objective, adaptation):
    """The reference is the model that training started from, and the objective keeps its keys."""
    made = recipe(tmp_path, "llama", objective, adaptation, max_steps=2, eval_steps=2)
    made["data"]["eval"] = {"path": made["data"]["train"][0]["path"]}
    found = tunesmith.train(made, out=tmp_path / "run")
    again = tunesmith.evaluate(tmp_path / "run", made["data"]["eval"]["path"], precision="fp32")
    for name in found["figures"]:
        if name in again and isinstance(found[name], float):
            assert again[name] == pytest.approx(found[name], abs=2e-5), name
    assert "eval_rewards/margins" in again


def test_a_reference_that_is_gone_or_never_was_saved_is_refused(tmp_path):
    made = recipe(tmp_path, "llama", "dpo", "full", max_steps=1)
    tunesmith.train(made, out=tmp_path / "run")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences(3)))
    (tmp_path / "model-llama").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"is not there.\n.*--reference MODEL"):
        tunesmith.evaluate(tmp_path / "run", tmp_path / "pairs.jsonl")
    moved = tunesmith.evaluate(tmp_path / "run", tmp_path / "pairs.jsonl", reference=tmp_path / "moved")
    assert moved["eval_kl"] > 0
