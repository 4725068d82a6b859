"""The verdict on a run, its baselines and intervals: one computation for every objective."""

import html
import io
import json
import math
from functools import cache

import pytest

import tunesmith
from tests.matrix.cells import OBJECTIVES as KEYS
from tests.runs import recipe
from tunesmith import objectives
from tunesmith.cli.evaluate import _tables
from tunesmith.cli.train import summary
from tunesmith.metrics.intervals import RowFigure
from tunesmith.report import language
from tunesmith.runs import assessment
from tunesmith.runs.figure_format import change_text, number

OBJECTIVES = ("sft", "cpt", "classify", "tag", "qa", "reward", "dpo", "kto", "grpo", "ppo")
ENCODED = ("classify", "tag", "qa")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """objective -> (result, run folder, rows) of a short run that is evaluated on its training rows."""

    @cache
    def train(objective):
        folder = tmp_path_factory.mktemp(objective)
        name = "bert" if objective in ENCODED else "llama"
        count = 32 if objective in ("cpt", "kto") else 16  # a document for two rows, and two rows for a prompt
        made = recipe(folder, name, KEYS[objective], count=count, max_steps=4, eval_steps=2, learning_rate=1e-3)
        made["data"]["eval"] = {"path": made["data"]["train"][0]["path"]}
        if objective == "tag":  # texts that are all different
            rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
            rows = [{"tokens": [*row["tokens"], str(n)], "ner_tags": [*row["ner_tags"], "O"]} for n, row in enumerate(rows)]
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tunesmith.train(made, out=folder / "run"), folder / "run", folder / "rows.jsonl"

    return train


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_values_of_rows_make_the_figures_of_the_evaluation(runs, objective):
    result, _, _ = runs(objective)
    figures = result["assessment"]["figures"]
    measured = {name: one for name, one in figures.items() if "rows" in one}
    assert objectives.module(objective).Objective.traits.best[0] in measured
    assert ("perplexity" in measured) == ("perplexity" in objectives.module(objective).Objective.traits.figures)
    for name, one in measured.items():
        assert one["value"] == pytest.approx(result[name], abs=1e-6), name
        assert one["change"]["value"] == pytest.approx(result[name] - result[f"{name}_before"], abs=1e-6), name
        assert one["change"]["low"] <= one["change"]["value"] <= one["change"]["high"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_page_in_korean_has_the_notes_verdicts_and_baselines_of_the_run_in_korean(runs, objective):
    _, folder, _ = runs(objective)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assessed = manifest["result"]["assessment"]
    words = {one["baseline"]["words"] for one in assessed["figures"].values() if one.get("baseline")}
    unknown = [line for line in (*manifest["notes"], *assessed["verdict"], *words) if not language.translation(line)]
    assert unknown == []


BASELINES = {
    "classify": {
        "eval_accuracy": (6 / 16, "always good, the most frequent"),
        "eval_macro_f1": (2 * 6 / (16 + 6) / 3, "always good, the most frequent"),
        "eval_loss": (None, "the frequency of each as its probability"),
    },
    "tag": {
        "eval_f1": (0.0, "always O"),
        "eval_accuracy": (None, "always O"),
        "eval_loss": (None, "the frequency of each as its probability"),
    },
    "qa": {"eval_f1": (0.0, "always no answer"), "eval_exact_match": (0.0, "always no answer")},
    "reward": {
        "eval_accuracy": (None, "always the longer answer"),
        "eval_loss": (math.log(2), "equal rewards"),
        "eval_margin": (0.0, "equal rewards"),
    },
    "kto": {"eval_loss": (0.5, "the reference policy, unchanged")},
    "dpo": {
        "eval_rewards/accuracies": (None, "always the longer answer"),
        "eval_loss": (math.log(2), "the reference policy, unchanged"),
        "eval_rewards/margins": (0.0, "the reference policy, unchanged"),
    },
}


@pytest.mark.parametrize("objective", BASELINES)
def test_each_objective_names_the_rule_that_needs_no_model(runs, objective):
    figures = runs(objective)[0]["assessment"]["figures"]
    for name, (value, words) in BASELINES[objective].items():
        baseline = figures[name]["baseline"]
        assert baseline["words"] == words and 0 <= baseline["value"] <= 1.5
        assert value is None or baseline["value"] == pytest.approx(value)


def test_two_objectives_agree_on_the_longer_answer(runs):
    of_reward = runs("reward")[0]["assessment"]["figures"]["eval_accuracy"]["baseline"]
    of_dpo = runs("dpo")[0]["assessment"]["figures"]["eval_rewards/accuracies"]["baseline"]
    assert of_reward["value"] == pytest.approx(of_dpo["value"])


def plain(shown, width=200):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    for one in shown:
        console.print(one)
    return console.export_text()


@pytest.mark.parametrize("objective", ["sft", "classify", "reward"])
def test_terminal_report_and_evaluation_show_the_same_assessment(runs, objective):
    result, folder, rows = runs(objective)
    found = result["assessment"]
    ended = plain(summary(result))
    page = (folder / "report.html").read_text("utf-8")
    again = tunesmith.evaluate(folder, rows, precision="fp32")
    evaluated = plain(_tables(again))
    assert f"verdict    {found['verdict'][0]}" in ended
    assert "Better than before training" in page or "No difference from before training" in page
    for one in found["figures"].values():
        if one.get("change"):
            assert change_text(one["change"]) in ended
        if one.get("baseline"):
            assert one["baseline"]["words"] in ended and one["baseline"]["words"] in page
            assert one["baseline"]["words"] in evaluated
    name = next(iter(found["figures"]))
    assert again["assessment"]["figures"][name]["value"] == pytest.approx(found["figures"][name]["value"], abs=1e-5)


@pytest.mark.parametrize(("objective", "groups"), [("classify", "per_class"), ("tag", "by_type")])
def test_the_page_of_an_evaluation_has_intervals_and_baselines(objective, groups, runs, tmp_path):
    _, folder, rows = runs(objective)
    found = tunesmith.evaluate(folder, rows, precision="fp32", out=tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text("utf-8")
    for name, one in found["assessment"]["figures"].items():
        assert f"{number(one['low'])} to {number(one['high'])}" in page if "low" in one else True, name
        assert one["baseline"]["words"] in page if one.get("baseline") else True, name
    assert all(line[1:] in html.unescape(page) for line in found["assessment"]["verdict"])
    assert "low" in found["assessment"]["figures"]["eval_macro_f1" if objective == "classify" else "eval_f1"]
    classes = found["details"][groups].values()
    assert classes and all(one["f1_low"] <= one["f1"] <= one["f1_high"] for one in classes)
    assert "f1 low" in page and "f1 low" in plain(_tables(found))


def evaluation(rights, baseline=None, remarks=(), groups=None):
    rows = RowFigure({(0, row): (float(right), 1.0) for row, right in enumerate(rights)})
    known = RowFigure({(0, row): (float(right), 1.0) for row, right in enumerate(baseline or ())})
    always = {"words": "always good", "value": sum(baseline) / len(baseline), "rows": known} if baseline else {}
    baselines = {"eval_accuracy": always} if baseline else {}
    groups = {(0, row): row if groups is None else groups[row] for row in range(len(rights))}
    return json.loads(json.dumps(assessment.measured(3, {"eval_accuracy": rows}, baselines, remarks, groups)))


HALF, MOST, FEW = [0, 1] * 40, [1, 1, 1, 0] * 20, [1, 0, 0, 0] * 20


@pytest.mark.parametrize(
    ("before", "after", "baseline", "expected", "better"),
    [
        (FEW, MOST, FEW, ["better than before training: accuracy 0.25 -> 0.75"], True),
        (MOST, FEW, None, ["worse than before training: accuracy 0.75 -> 0.25"], False),
        (HALF, [*HALF[:-1], 0], None, ["no difference from before training can be told from chance"], None),
        (FEW, HALF, [1] * 80, ["better than before", "worse than the baseline (always good: 1)"], True),
        (FEW, HALF, [1, 0] * 40, ["better than before", "not clearly better than the baseline (always good: 0.5)"], True),
    ],
)
def test_the_verdict_in_words(before, after, baseline, expected, better):
    found = assessment.assess(evaluation(after, baseline), evaluation(before), "eval_accuracy")
    assert len(found["verdict"]) == len(expected)
    for line, words in zip(found["verdict"], expected):
        assert line.startswith(words)
    assert found["figures"]["eval_accuracy"]["change"]["better"] is better


def test_rows_with_the_same_prompt_are_no_independent_evidence():
    """Twelve prompts, each asked 20 times: the same gain that 240 prompts would prove is no evidence."""
    before = [row // 20 % 4 == 0 for row in range(240)]
    after = [row // 20 % 2 == 0 for row in range(240)]
    prompts = [row // 20 for row in range(240)]
    alone = assessment.assess(evaluation(after), evaluation(before), "eval_accuracy")
    clustered = assessment.assess(evaluation(after, groups=prompts), evaluation(before, groups=prompts), "eval_accuracy")
    assert alone["verdict"][0].startswith("better than before training")
    assert clustered["verdict"][0].startswith("no difference from before training can be told from chance")
    widths = [one["figures"]["eval_accuracy"]["high"] - one["figures"]["eval_accuracy"]["low"] for one in (alone, clustered)]
    assert widths[1] > 3 * widths[0]


def test_few_held_out_rows_are_named():
    found = assessment.assess(evaluation([1] * 9), evaluation([0] * 9), "eval_accuracy")
    assert found["verdict"] == ["9 held-out rows are too few to say whether the model is better: 10 different ones are needed"]
    assert found["figures"]["eval_accuracy"]["change"] is None
    copied = assessment.assess(evaluation([1] * 27, groups=[*range(9)] * 3), evaluation([0] * 27), "eval_accuracy")
    assert copied["verdict"][0].startswith("27 held-out rows with 9 different prompts are too few")


def test_the_clusters_of_a_run_are_the_prompts_of_its_rows(tmp_path):
    """A run that copies each held-out row is no surer of its loss than a run without the copies."""
    made = recipe(tmp_path, count=12, max_steps=1, eval_steps=1)
    rows = (tmp_path / "rows.jsonl").read_text().rstrip("\n") + "\n"
    found = []
    for copies in (1, 4):
        (tmp_path / "held_out.jsonl").write_text(rows * copies)
        made["data"]["eval"] = {"path": str(tmp_path / "held_out.jsonl")}
        found.append(tunesmith.train(made, out=tmp_path / f"run-{copies}")["assessment"]["figures"])
        evaluated = tunesmith.evaluate(tmp_path / f"run-{copies}", tmp_path / "held_out.jsonl", precision="fp32")
        found.append(evaluated["assessment"]["figures"])
    for name in ("eval_loss", "perplexity"):
        for one in found[1:]:
            assert [one[name][key] for key in ("low", "high")] == pytest.approx(
                [found[0][name][key] for key in ("low", "high")], rel=1e-3
            )
    change = [found[index]["eval_loss"]["change"] for index in (0, 2)]
    assert [change[1][key] for key in ("low", "high")] == pytest.approx([change[0][key] for key in ("low", "high")], rel=1e-2)


def test_a_model_that_predicts_one_class_only_is_named(tmp_path):
    made = recipe(tmp_path, "bert", "classify", max_steps=1, eval_steps=1, learning_rate=1e-8)
    made["data"]["eval"] = {"path": made["data"]["train"][0]["path"]}
    made["train"]["learning_rate"] = 1e-8
    found = tunesmith.train(made, out=tmp_path / "run")["assessment"]
    assert "it predicts one class only, good, for all 12 rows" in found["verdict"]
