"""The report of ``tunesmith evaluate``: the wrong rows with the highest loss, with gold and prediction."""

import json

import pytest

import tunesmith
from tests.runs import recipe
from tunesmith.errors import DataError
from tunesmith.evaluate.evaluate_options import EvaluateOptions


def test_options_are_a_value_or_keywords_and_a_wrong_name_is_an_error(trained):
    """The command line passes the value; a keyword replaces its field."""
    model, rows = trained("classify")
    timing = ("seconds", "tokens_per_second")
    value, words = (
        {key: one for key, one in found.items() if key not in timing}
        for found in (
            tunesmith.evaluate(model, rows, EvaluateOptions(limit=5), precision="fp32"),
            tunesmith.evaluate(model, rows, limit=5, precision="fp32"),
        )
    )
    assert value == words and value["rows"] == 5
    with pytest.raises(TypeError, match="limits"):
        tunesmith.evaluate(model, rows, limits=5)


@pytest.mark.parametrize("objective", ["tag", "qa"])
def test_mistakes_hold_the_characters_of_gold_and_prediction(tmp_path, objective, trained):
    tunesmith.evaluate(*trained(objective), out=tmp_path / "report")
    mistakes = [json.loads(line) for line in (tmp_path / "report" / "mistakes.jsonl").read_text().splitlines()]
    assert mistakes
    for one in mistakes:
        true = [one["text"][span["start"] : span["end"]] for span in one["gold_spans"]]
        if objective == "tag":
            words = one["text"].split(" ")
            assert true == [word for word, tag in zip(words, one["gold"], strict=True) if tag != "O"]
        else:
            assert true == one["gold"]
            assert [one["text"][span["start"] : span["end"]] for span in one["predicted_spans"]] == [one["prediction"]]
    assert "<mark" in (tmp_path / "report" / "report.html").read_text()


def test_bad_rows_stop_an_evaluation_or_are_left_out_and_counted(tmp_path, trained):
    model, rows = trained("classify")
    file = tmp_path / "rows.jsonl"
    good = len(rows.read_text("utf-8").splitlines())
    file.write_text(rows.read_text("utf-8") + '\n{"text": "a", "label": "never seen"}\n', "utf-8")
    with pytest.raises(DataError, match="--bad-rows skip"):
        tunesmith.evaluate(model, file)
    again = tunesmith.evaluate(model, file, bad_rows="skip", out=tmp_path / "report")
    assert again["rows"] == good and again["bad_rows"] == 1
    assert "1 bad rows were left out" in (tmp_path / "report" / "report.html").read_text("utf-8")


def test_a_report_without_mistakes_shows_none(tmp_path, trained):
    """All rows have the labels that the model predicts."""
    model, rows = trained("classify")
    texts = [json.loads(line)["text"] for line in rows.read_text("utf-8").splitlines()]
    answers = tunesmith.predict(model, rows)
    content = [{"text": text, "label": answer["label"]} for text, answer in zip(texts, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, content)), "utf-8")
    assert tunesmith.evaluate(model, tmp_path / "rows.jsonl", out=tmp_path / "report")["eval_accuracy"] == 1.0
    assert (tmp_path / "report" / "mistakes.jsonl").read_text() == ""
    assert "Worst mistakes" not in (tmp_path / "report" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "classify", "class_weights": {"good": 3.0, "bad": 0.2}},
        {"type": "classify", "label_smoothing": 0.3},
        {"type": "tag", "label_all": True},
    ],
)
def test_the_loss_equals_that_of_the_run_for_every_training_loss(tmp_path, objective):
    """Class weights, label smoothing and extra supervised tokens apply to training only and are not saved with the model."""
    plan = recipe(tmp_path, "bert", objective, max_steps=2, eval_steps=2)
    file = plan["data"]["train"][0]["path"]
    plan["data"]["eval"] = {"path": file}
    found = tunesmith.train(plan, out=tmp_path / "run")
    again = tunesmith.evaluate(found["model_dir"], file, precision="fp32")
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    assert again["eval_loss_stderr"] > 0
