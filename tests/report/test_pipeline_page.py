"""The page of a pipeline: one file, every stage with its figures and a link, answers side by side, all text escaped."""

from __future__ import annotations

import re

from tunesmith.report import pipeline_page


def stage(name, **keys):
    done = {
        "current": True, "figures": {"eval_loss": [2.5, 1.25], "eval_accuracy": [None, 0.75]}, "verdict": ["better <than> before"],
        "steps": 1200, "train_seconds": 61.0, "peak_memory_bytes": 2_000_000_000,
    }  # fmt: skip
    facts = {"stage": name, "objective": "dpo", "adaptation": "lora", "model": "sft", "action": "train", "current": False}
    return facts | (done if keys.pop("done", True) else {}) | keys


FACTS = {
    "pipeline": "pipe.yaml", "out": "runs/pipe", "tunesmith": "0.1.0",
    "stages": [stage("first"), stage("second", done=False)],
    "comparison": {
        "models": [{"model": "base", "words": 2.5, "reward by r": None}, {"model": "first", "words": 3.0, "reward by r": 0.5}],
        "prompts": [{
            "prompt": "what is <b>?", "reference": "an answer", "answers": {"base": "", "first": "<script>alert(1)</script>"},
            "rewards": {"r": {"base": None, "first": 0.125}},
        }],
    },
}  # fmt: skip


def test_every_stage_has_its_figures_and_a_link_to_its_report(tmp_path):
    page = pipeline_page.write(tmp_path, FACTS).read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"', page) == ["first/report.html"], "a stage that was not trained has none"
    for shown in ("1 of 2", "1,200", "1:01", "2.00 GB", "Eval accuracy", "2.5", "1.25", "0.75", "better &lt;than&gt; before"):
        assert shown in page, shown
    assert "not trained" in page


def test_answers_are_side_by_side_and_cannot_run(tmp_path):
    page = pipeline_page.write(tmp_path, FACTS).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "what is &lt;b&gt;?" in page
    assert "first, reward by r 0.125" in page and "(empty)" in page and "an answer" in page
    assert "src=" not in page and "default-src 'none'" in page


def test_without_a_comparison_the_page_ends_with_the_figures(tmp_path):
    page = pipeline_page.write(tmp_path, FACTS | {"comparison": None}).read_text(encoding="utf-8")
    assert "Answers to the same" not in page
