"""The figures of each evaluation set equal those of a run with that set alone, for every split, layout and number of processes."""

from __future__ import annotations

import json

import pytest

import tunesmith
from tests.runs import recipe
from tests.train.launching import forked
from tunesmith.report.run_page import write_report
from tunesmith.runs import metrics_file

NAMES = ("short", "long")


@pytest.fixture
def made(tmp_path):
    """A run of two steps, and two held-out files: one row (of two processes one has nothing to do), and seven unequal ones."""
    made = recipe(tmp_path, count=10, eval_steps=1, max_steps=2)
    rows = {
        "short": [{"prompt": f"who {n}", "completion": f" she {n}"} for n in range(1)],
        "long": [{"prompt": f"what is {n}:" + " the" * (n % 4), "completion": " the lazy dog" * (1 + n % 3)} for n in range(7)],
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "both.jsonl").write_text("".join((tmp_path / f"{name}.jsonl").read_text() for name in NAMES))
    made["data"]["eval"] = {"sets": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in NAMES}}
    return made


def evaluations(run):
    return [record for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == "eval"]


def alone(made, name, tmp_path):
    other = {**made, "data": {**made["data"], "eval": {"path": str(tmp_path / f"{name}.jsonl")}}}
    tunesmith.train(other, out=tmp_path / f"run-{name}")
    return evaluations(tmp_path / f"run-{name}")


@pytest.mark.parametrize("change", [{}, {"micro_batch_tokens": 1}, {"packing": "off", "micro_batch_tokens": 70}])
def test_each_set_has_the_figures_of_a_run_with_it_alone(made, change, tmp_path):
    tunesmith.train({**made, "train": {**made["train"], **change}}, out=tmp_path / "sets")
    found = evaluations(tmp_path / "sets")
    assert len(found) == 3
    for name in NAMES:
        for ours, theirs in zip(found, alone(made, name, tmp_path), strict=True):
            assert ours[f"eval_{name}_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-6)
            assert ours[f"eval_{name}_perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)
    for ours, theirs in zip(found, alone(made, "both", tmp_path), strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-6)
        assert ours["best"] == theirs["best"]


def test_two_processes_have_the_figures_of_one(made, tmp_path):
    tunesmith.train(made, out=tmp_path / "one")
    assert forked(made, tmp_path / "two") == [0, 0]
    for one, two in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "two"), strict=True):
        assert {key for key in one if key.startswith("eval_") and not key.endswith("_stderr")} == {
            "eval_loss", *(f"eval_{name}_{figure}" for name in NAMES for figure in ("loss", "perplexity")),
        }  # fmt: skip
        assert all(one[key] == pytest.approx(two[key], rel=1e-6) for key in one if key.startswith("eval_"))


def test_the_outcome_and_the_report_show_every_set(made, tmp_path):
    outcome = tunesmith.train(made, out=tmp_path / "run")
    assert outcome["eval_sets"] == list(NAMES)
    first, best = evaluations(tmp_path / "run")[0], evaluations(tmp_path / "run")[outcome["best_step"]]
    for name in NAMES:
        assert outcome[f"eval_{name}_loss_before"] == first[f"eval_{name}_loss"]
        assert outcome[f"eval_{name}_perplexity"] == best[f"eval_{name}_perplexity"]
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h2>Evaluation sets</h2>" in html
    for number, name in enumerate(NAMES):
        assert f'<span class="key set{number}">eval {name}</span>' in html and f"<td>{name}</td>" in html
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert list(manifest["data"]["eval_sets"]) == list(NAMES)
