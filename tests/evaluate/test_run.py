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
