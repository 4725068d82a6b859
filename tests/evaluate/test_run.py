"""The report of ``tunesmith evaluate``: the worst rows are shown with what is true and what was said in its place."""

import json

import pytest

import tunesmith
from tests.runs import recipe


@pytest.mark.parametrize("objective", ["tag", "qa"])
def test_mistakes_say_where_the_true_and_the_predicted_are(tmp_path, objective):
    plan = recipe(tmp_path, "bert", objective, max_steps=1)
    found = tunesmith.train(plan, out=tmp_path / "run")
    tunesmith.evaluate(found["model_dir"], plan["data"]["train"][0]["path"], out=tmp_path / "report")
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


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "classify", "class_weights": {"good": 3.0, "bad": 0.2}},
        {"type": "classify", "label_smoothing": 0.3},
        {"type": "tag", "label_all": True},
    ],
)
def test_the_loss_is_that_of_the_run_whatever_it_was_trained_by(tmp_path, objective):
    """Weights, smoothing and further tokens are for learning; they do not go with the saved model."""
    plan = recipe(tmp_path, "bert", objective, max_steps=2, eval_steps=2)
    file = plan["data"]["train"][0]["path"]
    plan["data"]["eval"] = {"path": file}
    found = tunesmith.train(plan, out=tmp_path / "run")
    again = tunesmith.evaluate(found["model_dir"], file, precision="fp32")
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    assert again["eval_loss_stderr"] > 0
