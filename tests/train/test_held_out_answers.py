"""Answers to held-out prompts at every evaluation: their figures, the best model, resume, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest

import tunesmith
from tests.runs import history, killed_before, preferences, recipe, rows
from tunesmith import recipe as recipes
from tunesmith.errors import MetricError, RecipeError
from tunesmith.runs import metrics_file


def made_recipe(folder, **keys):
    """A run of 6 steps that memorises its rows and answers 10 of them at every second step."""
    made = recipe(folder, count=12, max_steps=6, eval_steps=2, save_steps=2, learning_rate=1e-2)
    generate = {"rows": 10, "max_new_tokens": 12, "metrics": ["token_f1", "bleu", "length"]}
    made["data"]["eval"] = {"path": made["data"]["train"][0]["path"], "generate": generate}
    made["train"]["metric_for_best_model"] = "answer_token_f1"
    return {**made, **keys}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    made = made_recipe(folder)
    return tunesmith.train(made, out=folder / "run"), folder, made


def evaluations(folder):
    return [one for one in metrics_file.read(folder / "metrics.jsonl") if one["kind"] == "eval"]


def test_every_evaluation_has_the_figures_of_answers(run):
    _, folder, _ = run
    records = evaluations(folder / "run")
    assert [one["step"] for one in records] == [0, 2, 4, 6]
    assert all({"eval_answer_token_f1", "eval_answer_bleu", "eval_answer_length"} <= one.keys() for one in records)


def test_they_are_those_of_evaluate_generate(run):
    result, folder, _ = run
    names = ["token_f1", "bleu", "length"]
    again = tunesmith.evaluate(
        folder / "run", folder / "rows.jsonl", generate=10, max_new_tokens=12, answer_metrics=names, precision="fp32"
    )["generated"]
    for name in names:
        kept = result["assessment"]["figures"][f"eval_answer_{name}"]
        assert result[f"eval_answer_{name}"] == pytest.approx(again["figures"][name]["value"], rel=1e-12)
        assert [kept[key] for key in ("low", "high")] == pytest.approx([again["figures"][name][key] for key in ("low", "high")])
    copied = result["assessment"]["figures"]["eval_answer_bleu"]["baseline"]
    (known,) = [one for one in again["figures"]["bleu"]["baselines"] if one["words"] == "the prompt copied"]
    assert copied["words"] == known["words"] and copied["value"] == pytest.approx(known["value"])
    assert [copied["change"][key] for key in ("value", "low", "high")] == pytest.approx(
        [known[key] for key in ("difference", "low", "high")]
    )


def test_a_figure_of_answers_chooses_the_best_model(run):
    result, folder, _ = run
    records = evaluations(folder / "run")[1:]
    best = max(records, key=lambda one: one["eval_answer_token_f1"])
    first = next(one["step"] for one in records if one["eval_answer_token_f1"] == best["eval_answer_token_f1"])
    assert result["best_step"] == first
    assert result["assessment"]["verdict"][0].partition("answer token f1")[1]


def test_the_report_has_the_figures_and_the_worst_answers(run):
    _, folder, _ = run
    page = (folder / "run" / "report.html").read_text()
    assert "Answers to held-out prompts" in page and "the prompt copied" in page and "Worst answers" in page


def test_a_killed_run_goes_on_to_the_same_records(run, tmp_path):
    _, folder, made = run
    killed_before(4, made, tmp_path / "run")
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(folder / "run")
    kept = [json.loads((one / "run" / "held_out.json").read_text()) for one in (folder, tmp_path)]
    assert kept[0] == kept[1]


def test_answers_change_nothing_that_is_trained(run, tmp_path):
    _, folder, made = run
    plain = copy.deepcopy(made)
    plain["data"]["eval"].pop("generate")
    plain["train"].pop("metric_for_best_model")
    tunesmith.train(plain, out=tmp_path / "run")
    losses = [
        [(one["step"], one["loss"]) for one in history(place / "run") if one["kind"] == "train"] for place in (folder, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_held_out_rows_of_a_fraction_are_the_ones_that_are_answered(tmp_path):
    made = made_recipe(tmp_path, task="summarise")
    made["data"]["eval"] = {"fraction": 0.5}
    made["train"] = {**made["train"], "metric_for_best_model": "answer_rougeL", "max_steps": 2}
    result = tunesmith.train(made, out=tmp_path / "run")
    figures = {key for key in evaluations(tmp_path / "run")[0] if key.startswith("eval_answer_")}
    assert figures == {f"eval_answer_{name}" for name in ("rougeL", "rouge1", "rouge2", "length", "stopped", "repetition")}
    worst = json.loads((tmp_path / "run" / "held_out.json").read_text())["after"]["worst_answers"]
    texts = {row["prompt"]: row["completion"] for row in rows(12)}
    assert worst and all(texts[one["prompt"]] == one["references"][0] for one in worst)
    generated = tunesmith.evaluate(tmp_path / "run", tmp_path / "rows.jsonl", generate=2, max_new_tokens=2, precision="fp32")
    assert list(generated["generated"]["figures"])[:2] == ["rougeL", "rouge1"], "the task is kept with the model"
    assert result["eval_answer_rougeL"] >= 0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": "classify", "samples": {}}, "data.eval.generate: a model of classify writes no text. Leave it out"),
        (
            {"objective": "classify", "samples": {}, "task": "translate", "data.eval.generate": None},
            "task: a model of classify writes no text",
        ),
        ({"objective": "cpt"}, "cpt learns from documents, which have no prompts to answer"),
        ({"data.eval": {"fraction": 0, "generate": {"rows": 5}}}, "data.eval.generate does nothing: no row is held out"),
        ({"data.eval.generate.metrics": ["rougel"]}, "there is no metric 'rougel'. Did you mean `rougeL`"),
        ({"train.metric_for_best_model": "answer_rouge1"}, "sft reports no figure 'answer_rouge1' .*Did you mean"),
        ({"data.eval.generate.rows": 0}, "data.eval.generate.rows"),
    ],
)
def test_what_cannot_be_answered_is_refused(tmp_path, changes, words):
    made = made_recipe(tmp_path)
    for key, value in changes.items():
        *parts, last = key.split(".")
        place = made
        for part in parts:
            place = place[part]
        place[last] = value
    with pytest.raises(RecipeError, match=words):
        recipes.parse(made)


def test_a_function_of_the_user_measures_and_what_it_raises_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "held_out_metric.py").write_text(
        "def brevity(prompts, answers, references):\n    return [-len(answer) for answer in answers]\n\n"
        "def broken(prompts, answers, references):\n    raise ValueError('no')\n"
    )
    made = made_recipe(tmp_path)
    made["data"]["eval"]["generate"]["metrics"] = ["held_out_metric:brevity"]
    made["train"] = {**made["train"], "metric_for_best_model": "answer_brevity", "max_steps": 2}
    assert tunesmith.train(made, out=tmp_path / "run")["eval_answer_brevity"] <= 0
    made["data"]["eval"]["generate"]["metrics"] = ["held_out_metric:broken"]
    made["train"]["metric_for_best_model"] = None
    with pytest.raises(MetricError, match=r"held_out_metric:broken failed \(held_out_metric.py, line 5\): ValueError: no"):
        tunesmith.train(made, out=tmp_path / "broken")


def test_prompts_that_fill_the_window_are_left_out_and_counted(tmp_path):
    """A pair whose prompt is cut is trained on; its whole prompt has no room for an answer."""
    made = recipe(tmp_path, objective={"type": "dpo", "overlong": "truncate"}, count=12, max_steps=1, eval_steps=1)
    long = {"prompt": "what is the " * 400, "chosen": " x", "rejected": " y"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [long, *preferences(12)]))
    generate = {"rows": 20, "max_new_tokens": 4, "metrics": ["token_f1"]}
    made["data"]["eval"] = {"path": made["data"]["train"][0]["path"], "generate": generate}
    tunesmith.train(made, out=tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert "data.eval.generate: 1 held-out prompts fill the model's window and are not answered" in notes
