import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tunesmith.report.run_page import write_report
from tunesmith.runs.metrics_file import Metrics

pytestmark = pytest.mark.usefixtures("not_drawn")

ATTACK = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "img", "br", "path", "link"}


class Page(HTMLParser):
    """The elements and attributes a browser would see, and its text; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data if self._open[-1:] != ["style"] else ""


def page(folder):
    report = write_report(folder)
    assert report == folder / "report.html"
    html = report.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def run(tmp_path):
    """A finished run, with text from outside wherever there can be some."""
    folder = tmp_path / "run-a"
    folder.mkdir()
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.append({"kind": "eval", "step": 0, "epoch": 0.0, "eval_loss": 2.1143, "perplexity": 8.284, "seconds": 3.0})
    for step in range(1, 41):
        figures = {"loss": 1 + 1 / step, "learning_rate": 2e-4, "grad_norm": 0.8, "tokens_per_second": 670.0}
        metrics.append({"kind": "train", "step": step, "epoch": step / 20, "memory_bytes": 10**9, **figures})
    metrics.append({"kind": "eval", "step": 40, "epoch": 2.0, "eval_loss": 1.4616, "perplexity": 4.313, "seconds": 3.0})
    manifest = {
        "tunesmith": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "command": f"tunesmith train {ATTACK}",
        "model": {"name": f"model {ATTACK}"},
        "objective": {"type": "sft"},
        "adaptation": "lora",
        "parameters": {"trainable": 2_442_240, "total": 136_957_248},
        "data": {
            "max_length": 742,
            "duplicates_train_eval": 7,
            "sources": [{"path": f"data/{ATTACK}.json", "rows_read": 999, "rows_kept": 996, "problems": [f"row 3 {ATTACK}"]}],
            "train": {
                **{"rows": 900, "tokens": 200_000, "supervised_tokens": 76_000, "unlearnable_first": [f"{ATTACK}.json:3"]},
                "overlong": {"policy": "truncate", "rows": 5, "tokens_lost": 600, "share_lost": 0.003},
                "histogram": {"edges": [16, 32, 742], "counts": [100, 500, 300], "median": 30.0, "p95": 400.5, "max": 742},
            },
            "eval": {"rows": 96},
            ATTACK: ATTACK,
        },
        "notes": [f"a note {ATTACK}"],
        "machine": {"cpu": ATTACK, "memory_bytes": 25_300_000_000},
        "result": {
            **{"eval_loss_before": 2.1143, "eval_loss": 1.4616, "perplexity_before": 8.284, "perplexity": 4.313},
            **{"tokens_per_second": 667.8, "peak_memory_bytes": 1_934_213_120, "steps": 40, "train_seconds": 187.0},
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "recipe.yaml").write_text(f"model: smol\ndata: '{ATTACK}'\n", encoding="utf-8")
    lines = [
        {"step": step, "prompt": f"질문 {ATTACK}", "answer": f"답변 {step} {ATTACK}", "reference": f"정답 {ATTACK}"}
        for step in (0, 20, 40)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("after", [2.1142, 2.1144])
def test_a_change_that_rounds_to_nothing_is_neither_good_nor_bad(run, after):
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["result"] |= {"eval_loss": after}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    html, _ = page(run)
    assert "<span>0.0%</span>" in html and "-0.0%" not in html and "+0.0%" not in html


def test_the_headline_names_the_result(run):
    _, seen = page(run)
    for words in (
        "2.114 → 1.462",
        "-30.9%",
        "8.284 → 4.313",
        "668 tokens/s",
        "1.93 GB",
        "of 25.3 GB",
        "2.4M",
        "1.8% of 137.0M",
        "3:07",
    ):
        assert words in seen.text


def test_text_from_outside_is_shown_and_never_obeyed(run):
    html, seen = page(run)
    assert "<script" not in html
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "img", "iframe", "object", "a", "link", "form"})
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    # model in the headline, command, note, prompt, three answers, reference, a data key and its value, source path, a rejected
    # row, a row with nothing to learn, recipe, cpu, model again in the manifest
    assert seen.text.count("<script>alert(1)</script>") == 16
    assert "정답" in seen.text


def test_names_of_sets_and_figures_from_outside_are_escaped_too(run):
    """In legends, alternative texts, headings of tables and tiles."""
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["data"]["eval_sets"] = {ATTACK: {"rows": 3, ATTACK: 1}}
    manifest["result"]["stopped"] = manifest["tunesmith"] = ATTACK
    file.write_text(json.dumps(manifest), encoding="utf-8")
    figures = {f"eval_{ATTACK}_loss": 1.0, f"eval_{ATTACK}": 0.5, "eval_loss": 1.4}
    for step in (0, 40):
        Metrics(run / "metrics.jsonl").append({"kind": "eval", "step": step, **figures})
    Metrics(run / "metrics.jsonl").append({"kind": "train", "step": 41, f"{ATTACK}/own": 1.0})
    html, seen = page(run)
    assert "<script" not in html
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "img", "iframe", "object", "a", "link", "form"})
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    labels = [attributes["aria-label"] for _, attributes in seen.elements if "aria-label" in attributes]
    assert ATTACK in labels[0] and len([label for label in labels if ATTACK in label]) == 3


def test_half_a_letter_does_not_stop_the_page(run):
    (run / "samples.jsonl").write_text('{"step": 0, "prompt": "p", "answer": "a \\ud800 b"}\n')
    assert "a ? b" in page(run)[1].text


def test_the_page_asks_nothing_of_the_outside(run):
    html, seen = page(run)
    assert not re.search(r"https?:|//\w|url\(|@import", html)
    assert not [attributes for _, attributes in seen.elements if attributes.keys() & {"src", "href", "srcset", "action", "data"}]
    policy = next(attributes["content"] for tag, attributes in seen.elements if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_curves_are_drawn_and_the_loss_is_saved_as_a_picture(run, drawn):
    _, seen = page(run)
    labels = [attributes["aria-label"] for _, attributes in seen.elements if "aria-label" in attributes]
    assert labels == [
        "Loss by step: train from 2 to 1.025; eval from 2.114 to 1.462",
        "Learning rate by step: train from 2e-4 to 2e-4",
        "Gradient norm by step: train from 0.8 to 0.8",
        "Tokens per second by step: train from 670 to 670",
    ]
    assert len((run / "loss.png").read_bytes()) > 1000


def test_samples_stand_side_by_side(run):
    _, seen = page(run)
    kinds = [attributes["class"] for _, attributes in seen.elements if attributes.get("class", "").startswith("answer ")]
    assert kinds == ["answer before", "answer after", "answer reference", "answer between"]
    assert "before, step 0" in seen.text
    assert "after, step 40" in seen.text


def test_the_answer_shown_as_after_is_of_the_weights_that_were_kept(run):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["result"]["best_step"] = 20
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "after, step 20" in page(run)[1].text


def test_the_data_is_summed_up(run):
    _, seen = page(run)
    text = re.sub(r"\s+", " ", seen.text)
    for words in (
        "supervised tokens76,000 (38.0%)",
        "above max length5 (truncate)",
        "tokens lost by that600 (0.300%)",
        "longest742",
    ):
        assert words in text
    assert "eval rows also in train7" in text
    assert "1-1610017-3250033-742300" in text
    styles = [attributes.get("style", "") for tag, attributes in seen.elements if tag == "i"]
    assert [style for style in styles if style.startswith("width")] == ["width:20.0%", "width:100.0%", "width:60.0%"]


def test_the_report_of_the_data_layer_is_understood(run):
    """Its keys are named here, so that a renamed one is noticed."""
    from tunesmith.data.check.contamination import Contamination, SharedText
    from tunesmith.data.store.data_report import HeldOut, Report, SourceReport, SplitReport, histogram

    lengths = np.array([5, 20, 40])
    overlong = {"policy": "drop", "rows": 1, "tokens": 90, "tokens_lost": 90, "share_lost": 0.5, "supervised_lost": 30}
    split = SplitReport(3, 3, 65, 30, 1, ("a.json:9",), overlong, 2, histogram(lengths))
    left_out = {"rows": 2, "looked_at": 64, "first": ["a.json:4: reasoning"]}
    source = SourceReport("a.json", "train", "ab" * 32, "alpaca", 5, 4, 1, ("a.json:2: empty",), left_out, 1.0, False, 0.1)
    shared = Contamination(60, 1, 0.5, (SharedText("e.json:3", "a.json:4", "the same words"),), 1, 0)
    report = Report((source,), split, None, {}, HeldOut(30, 30, 100, 30, "ab"), "its own", 64, 0, shared, False, 0.2)
    manifest = {"data": json.loads(json.dumps(report.as_dict()))}
    (run / "manifest.json").write_text(json.dumps(manifest))
    _, seen = page(run)
    for words in (
        "a.json:2: empty",
        "a.json: 2 of 64 rows looked at, for example a.json:4: reasoning",
        "a.json:9",
        "abababababab",
        "share text with train1 (50.0%)",
        "held out rows30 of 100",
        "e.json:3a.json:4the same words",
    ):
        assert words in seen.text
    assert "tokens lost by that90 (50.0%)" in seen.text
    assert "1-16117-32133-401" in seen.text


def test_an_empty_folder_has_a_report(tmp_path):
    _, seen = page(tmp_path)
    assert "had not finished" in seen.text
    assert not (tmp_path / "loss.png").exists()


def test_a_run_killed_before_its_first_evaluation(run):
    for name in ("manifest.json", "samples.jsonl", "recipe.yaml"):
        (run / name).unlink()
    metrics = run / "metrics.jsonl"
    whole = [line for line in metrics.read_bytes().splitlines(keepends=True) if b'"train"' in line]
    metrics.write_bytes(b"".join(whole[:7]) + whole[7][:30])
    _, seen = page(run)
    assert "had not finished when the report was written. Its last record is of step 7." in seen.text
    assert "670 tokens/s" in seen.text
    assert "Eval loss" not in seen.text


def test_before_and_after_come_from_the_evaluations_while_a_run_goes_on(run):
    (run / "manifest.json").unlink()
    assert "2.114 → 1.462" in page(run)[1].text
    first = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (run / "metrics.jsonl").write_bytes(first)
    assert "Eval loss2.114before training" in page(run)[1].text


@pytest.mark.parametrize(
    ("name", "content"), [("manifest.json", b"{"), ("metrics.jsonl", b'oops\n{"step": 1}\n'), ("recipe.yaml", b"\xff\xfe\xff")]
)
def test_a_file_that_cannot_be_read_is_named(run, name, content):
    (run / name).write_bytes(content)
    assert f"{name} cannot be read" in page(run)[1].text


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"model": null, "result": [], "data": 3, "notes": "x", "parameters": {"total": 1}}']
)
def test_a_manifest_of_another_shape_does_no_harm(run, manifest):
    (run / "manifest.json").write_text(manifest)
    assert "had not finished" in page(run)[1].text


def test_the_report_names_the_nan_of_a_run(run):
    Metrics(run / "metrics.jsonl").append({"kind": "stop", "step": 41, "loss": math.nan, "grad_norm": math.inf, "rows": ["a:7"]})
    (run / "manifest.json").write_text('{"stopped": "NonFiniteError: step 41: the loss is nan"}')
    _, seen = page(run)
    assert seen.text.count("not finite at step 41") == 2
    assert "This run stopped. NonFiniteError: step 41: the loss is nan" in seen.text
    assert "had not finished" not in seen.text


def test_early_stopping_is_reported(run):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["result"]["stopped"] = "no improvement in 3 evaluations"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "Stopped early: no improvement in 3 evaluations" in page(run)[1].text


def test_writing_again_replaces_the_report_and_leaves_no_other_file(run):
    write_report(run)
    before = sorted(path.name for path in run.iterdir())
    write_report(str(run))
    assert sorted(path.name for path in run.iterdir()) == before


def test_figures_of_many_sets_get_the_whole_width(run):
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    assert page(run)[0].index('<div class="pair">') < page(run)[0].index("<h3>Examples</h3>")
    manifest["data"]["eval_sets"] = {"code": {"rows": 3}}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    assert page(run)[0].index("<h3>Examples</h3>") < page(run)[0].index('<div class="pair">')


def test_grave_notes_come_first_in_sentences(run):
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["data"]["sources"][0]["left_out"] = {"rows": 2, "looked_at": 64, "first": ["a.json:4: reasoning"]}
    manifest["data"]["contaminated"] = {"rows": 5, "share": 0.05}
    manifest["result"]["assessment"] = {"verdict": ["worse than before training: loss"], "figures": {}}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    _, seen = page(run)
    order = [
        "Worse than before training: loss.",
        "The chat template leaves out text, so the model did not learn it: data/",
        "7 held-out rows are also training rows, so the held-out figures are better",
        "5 held-out rows (5.0%) share long passages with training rows",
        "a note ",
    ]
    places = [seen.text.index(words) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize(("better", "trend"), [(True, "good"), (False, "bad"), (None, None)])
def test_a_change_has_a_colour_only_where_its_interval_does_not_hold_zero(run, better, trend):
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    high = 0.1 if better is None else -0.1
    change = {"value": -0.65, "low": -0.9, "high": high, "rows": 96, "better": better}
    baseline = {"words": "always good", "value": 0.5, "change": None}
    figures = {"eval_loss": {"value": 1.46, "change": change, "baseline": baseline}}
    manifest["result"]["assessment"] = {"verdict": [], "figures": figures}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    html, seen = page(run)
    assert f"-0.65 (-0.9 to {high:+})" in seen.text and "baseline 0.5: always good" in seen.text
    colours = {name for name in ("good", "bad") if f'<span class="{name}">' in html}
    assert colours == ({trend} if trend else set())
    assert ("may be chance" in seen.text) is (trend is None)


def test_a_figure_that_began_at_zero_has_its_interval_too(run):
    """As the margins of dpo do."""
    file = run / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change = {"value": 0.17, "low": 0.1, "high": 0.2, "rows": 96, "better": True}
    manifest["result"] |= {"eval_margin_before": 0.0, "eval_margin": 0.17}
    manifest["result"]["assessment"] = {"verdict": [], "figures": {"eval_margin": {"value": 0.17, "change": change}}}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    Metrics(run / "metrics.jsonl").append({"kind": "eval", "step": 40, "eval_margin": 0.17})
    html, seen = page(run)
    assert "+0.17 (+0.1 to +0.2)" in seen.text and '<span class="good">' in html
