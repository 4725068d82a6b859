"""Held-out answers in the report: the worst mistakes without repeats, and some right answers, with the text of their rows."""

import json

import pytest

import tunesmith
from tests.runs import recipe
from tunesmith.runs import assessment
from tunesmith.train import examples


@pytest.mark.parametrize("objective", ["classify", "tag", "qa", "reward", "dpo"])
def test_the_report_of_a_run_shows_answers_next_to_their_rows(tmp_path, objective):
    encoder = objective in ("classify", "tag", "qa")
    made = recipe(tmp_path, "bert" if encoder else "llama", objective, count=16, max_steps=2, eval_steps=2)
    made["data"]["eval"] = {"fraction": 0.5}
    tunesmith.train(made, out=tmp_path / "run")
    kept = assessment.read(tmp_path / "run")["examples"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    shown = [*kept["wrong"], *kept["right"]]
    assert shown
    for one in shown:
        row = rows[int(one["where"].rpartition(":")[2]) - 1]
        text = {"tag": " ".join(row.get("tokens", ())), "qa": row.get("context")}.get(objective)
        assert one["text"].strip() == (text or row.get("text") or row.get("prompt")).strip()
        assert f"rows.jsonl:{rows.index(row) + 1}" in page
    assert ("Worst mistakes on held-out rows" in page) is bool(kept["wrong"])
    assert ("Some right answers" in page) is bool(kept["right"])


def answer(row, gold, prediction, loss, **more):
    return {"row": [0, row], "gold": gold, "prediction": prediction, "loss": loss, **more}


def test_equal_mistakes_are_one_entry_with_a_count():
    answers = [answer(row, "good", "bad", row) for row in range(1, 6)]
    answers += [answer(6, "bad", "good", 0.5), answer(7, "good", "good", 0.1), answer(8, "good", None, None)]
    found = examples.select(answers, 10)
    assert [(one["row"][1], one["alike"]) for one in found["wrong"]] == [(5, 5), (6, 1)]
    assert [one["row"][1] for one in found["right"]] == [7]
    assert len(examples.select(answers, 1)["wrong"]) == 1


def test_tags_are_the_same_mistake_where_the_same_tags_are_confused():
    first = answer(1, ["B-PER", "O"], ["O", "O"], 1.0, scores=[0.5, 0.5])
    longer = answer(2, ["O", "O", "B-PER"], ["O", "O", "O"], 2.0, scores=[0.5] * 3)
    other = answer(3, ["O"], ["B-PER"], 3.0, scores=[0.5])
    found = examples.select([first, longer, other], 10)["wrong"]
    assert [(one["row"][1], one["alike"]) for one in found] == [(3, 1), (2, 2)]


def test_rankings_and_numbers_are_never_the_same_mistake():
    pairs = [answer(row, None, [0.0, 1.0], 1.0, right=False) for row in range(3)]
    numbers = [answer(row, 1.0, 2.0, 1.0) for row in range(3, 6)]
    assert len(examples.select([*pairs, *numbers], 10)["wrong"]) == 6
