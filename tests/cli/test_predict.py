"""``tunesmith predict`` and ``evaluate`` with output paths that cannot be written, and files that end too early."""

import json

import pytest

import tunesmith
from tests.runs import recipe
from tunesmith.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return tunesmith.train(recipe(folder, "bert", "classify", max_steps=1), out=folder / "run")["model_dir"]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a lazy dog", "label": "good"}\n' * 3, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_an_output_path_that_cannot_be_written_is_refused_before_the_work(verb, model, rows, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([verb, model, "--data", rows, "--out", str(tmp_path / "file" / "deep" / "out")]) == 2
    said = capsys.readouterr().err
    assert "cannot be made" in said and "--out" in said


def test_a_run_cannot_lie_under_a_file_either(rows, tmp_path, capsys):
    made = tmp_path / "recipe.json"
    made.write_text(json.dumps(recipe(tmp_path, "bert", "classify", max_steps=1)), encoding="utf-8")
    assert main(["train", str(made), "--out", f"{rows}/run"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_nothing_is_left_of_predictions_that_failed(model, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert main(["predict", model, "--data", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out" / "said.jsonl")]) == 2
    assert list((tmp_path / "out").iterdir()) == [] and "has no rows" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_a_length_above_the_window_is_refused(verb, model, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": "a lazy dog " * 100, "label": "good"}) + "\n")
    assert main([verb, model, "--data", str(file), "--max-length", "1000"]) == 2
    assert "max_length 1000 is above the model's window of 128 tokens. Take at most 128." in capsys.readouterr().err
