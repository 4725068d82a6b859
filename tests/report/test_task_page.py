"""The page of an evaluation: what stands on it, and that nothing on it can act."""

import json
import re

import numpy as np
import pytest

from tunesmith.metrics import classes, entities, squad
from tunesmith.report import task_page

pytestmark = pytest.mark.usefixtures("not_drawn")

NAMES = ["bad", "good"]
SINGLE = classes.single_label_metrics([0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], NAMES)
TEXT = "Ann met Bob Ray in Rome."


def body(tmp_path, figures=None, mistakes=(), **facts):
    report = task_page.write(tmp_path / "out", "a on b", SINGLE if figures is None else figures, mistakes, facts)
    assert report == tmp_path / "out" / "report.html"
    return report.read_text(encoding="utf-8").partition("</style>")[2]


def column(html, kind):
    """The text of the card's column "true" or "predicted"."""
    return re.search(rf'<div class="label">{kind}</div><div class="text">(.*?)</div></div>', html, re.DOTALL)[1]


def tiles(html):
    return re.findall(r'class="name">([^<]+)</div><div class="figure">([^<]+)', html)


def test_a_page_of_classes(tmp_path):
    html = body(tmp_path)
    assert tiles(html) == [("Accuracy", "0.6667"), ("Macro F1", "0.6667")]
    assert "0.6667 by always predicting the same" in html
    assert "calibration error" in html
    rows = re.findall(r'<tr><td class="num">(\d)</td><td>(\w+)</td>', html)
    assert rows == [("1", "good"), ("0", "bad")]  # the most frequent first
    assert html.count("<img ") == 3
    assert "Worst mistakes" not in html and "What was measured" not in html


def test_pictures_are_in_the_page_and_next_to_it(tmp_path, drawn):
    html = body(tmp_path, classes.multi_label_metrics([[1], [0]], [[0.9], [0.2]], ["x"]))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html", "per-class.png", "precision-recall.png", "calibration.png",
    }  # fmt: skip
    assert html.count('src="data:image/png;base64,') == 3
    body(tmp_path)
    assert (tmp_path / "out" / "confusion.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (classes.multi_label_metrics([[1], [0]], [[0.9], [0.2]], ["x"]), ["Micro F1", "Exact match", "Macro F1"]),
        (classes.regression_metrics([1, 2, 3], [1, 2, 4]), ["RMSE", "MAE", "Pearson"]),
        (entities.score([["B-X", "O"]], [["B-X", "O"]]), ["F1", "Precision", "Recall"]),
        (entities.score([["NN", "VB"]], [["NN", "NN"]]), ["Token accuracy"]),
        (squad.score({"1": "x"}, {"1": ["x"]}), ["Exact match", "F1"]),
        ({}, []),
    ],
)
def test_each_task_has_its_headline(tmp_path, figures, expected):
    assert [name for name, _ in tiles(body(tmp_path, figures))] == expected


def test_figures_from_a_file_make_the_same_page(tmp_path):
    assert body(tmp_path, json.loads(json.dumps(SINGLE))) == body(tmp_path)


def test_many_classes_are_folded(tmp_path):
    gold = np.arange(31)
    html = body(tmp_path, classes.single_label_metrics(gold, np.eye(31), [f"c{number}" for number in gold]))
    assert "<details><summary>31, the most frequent first" in html
    assert "<details>" not in body(tmp_path)


def test_facts_notes_and_the_command(tmp_path):
    html = body(tmp_path, model="runs/<a>", rows=3, notes=["2 rows < 3"], command="/opt/bin/tunesmith evaluate a")
    assert "runs/&lt;a&gt;" in html and "<li>2 rows &lt; 3</li>" in html
    assert '<code class="command">$ tunesmith evaluate a</code>' in html
    assert "notes</dt>" not in html and "command</dt>" not in html


def test_facts_are_not_changed(tmp_path):
    facts = {"notes": ["x"], "command": "y", "rows": 1}
    task_page.write(tmp_path, "t", {}, (), facts)
    assert facts == {"notes": ["x"], "command": "y", "rows": 1}


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_a_class_that_was_mistaken(tmp_path):
    chances = {"bad": 0.9, "good": 0.1}
    html = body(tmp_path, mistakes=[
        {"where": "f.csv:3", "text": "a & b", "text_pair": "c", "gold": "good", "prediction": "bad", "probabilities": chances, "loss": 2.5},
    ])  # fmt: skip
    assert '<div class="label">f.csv:3 · loss 2.5</div>' in html
    assert "a &amp; b" in html and '<div class="text">c</div>' in html
    assert column(html, "true") == "good"
    assert column(html, "predicted") == 'bad\n<span class="soft">bad 0.9 · good 0.1</span>'


def test_the_true_class_is_always_among_the_probabilities(tmp_path):
    chances = {f"c{number}": 0.3 - number * 0.03 for number in range(8)}
    html = body(tmp_path, mistakes=[{"where": "f:1", "text": "x", "gold": ["c7"], "prediction": [], "probabilities": chances}])
    assert re.findall(r"c\d", column(html, "predicted")) == ["c0", "c1", "c2", "c3", "c4", "c7"]
    assert "(none)" in column(html, "predicted")


def test_several_labels_and_numbers(tmp_path):
    html = body(tmp_path, {}, [{"where": "f:1", "text": "x", "gold": ["a", "b"], "prediction": 1.23456}])
    assert column(html, "true") == "a | b" and column(html, "predicted") == "1.235"


def test_entities_are_marked_in_the_text(tmp_path):
    gold = [{"start": 0, "end": 3, "type": "P"}, {"start": 8, "end": 15, "type": "P"}]
    said = [{"start": 8, "end": 11, "type": "P"}, {"start": 0, "end": 3, "type": "P"}]
    html = body(tmp_path, {}, [{"where": "f:1", "text": TEXT, "gold_spans": gold, "predicted_spans": said}])
    right = '<mark class="right">Ann<sub>P</sub></mark>'
    assert column(html, "true") == f'{right} met <mark class="wrong">Bob Ray<sub>P</sub></mark> in Rome.'
    assert column(html, "predicted") == f'{right} met <mark class="wrong">Bob<sub>P</sub></mark> Ray in Rome.'


def test_a_place_with_another_type_is_wrong(tmp_path):
    html = body(tmp_path, {}, [{
        "where": "f:1", "text": TEXT, "gold_spans": [{"start": 0, "end": 3, "type": "P"}], "predicted_spans": [{"start": 0, "end": 3, "type": "Q"}],
    }])  # fmt: skip
    assert 'class="right"' not in html and html.count('class="wrong"') == 2


def test_entities_that_nobody_found_leave_the_text_plain(tmp_path):
    html = body(
        tmp_path, {}, [{"where": "f:1", "text": TEXT, "gold_spans": [{"start": 0, "end": 3, "type": "P"}], "predicted_spans": []}]
    )
    assert column(html, "predicted") == TEXT


def test_a_question_has_its_answers_in_place(tmp_path):
    html = body(tmp_path, {}, [{
        "where": "f:1", "question": "Who?", "text": TEXT, "gold": ["Bob Ray"], "prediction": "Bob", "f1": 2 / 3,
        "gold_spans": [{"start": 8, "end": 15}], "predicted_spans": [{"start": 8, "end": 11}],
    }])  # fmt: skip
    assert "f:1 · F1 0.6667" in html and '<div class="text">Who?</div>' in html
    assert column(html, "true") == '<b>Bob Ray</b>\nAnn met <mark class="wrong">Bob Ray</mark> in Rome.'
    assert column(html, "predicted") == '<b>Bob</b>\nAnn met <mark class="wrong">Bob</mark> Ray in Rome.'


def test_a_question_without_an_answer_shows_none(tmp_path):
    html = body(tmp_path, {}, [{
        "where": "f:1", "question": "Who?", "text": TEXT, "gold": [], "prediction": "Bob", "predicted_spans": [{"start": 8, "end": 11}],
    }])  # fmt: skip
    assert column(html, "true") == '<span class="soft">(none)</span>'


def test_a_long_text_is_cut_around_what_is_marked(tmp_path):
    text = "a" * 5000 + "ANSWER" + "b" * 5000
    html = body(
        tmp_path, {}, [{"where": "f:1", "text": text, "prediction": "x", "predicted_spans": [{"start": 5000, "end": 5006}]}]
    )
    assert column(html, "predicted") == "<b>x</b>\n…" + "a" * 200 + '<mark class="wrong">ANSWER</mark>' + "b" * 200 + "…"


def test_a_text_of_some_sentences_is_shown_whole(tmp_path):
    html = body(
        tmp_path, {}, [{"where": "f:1", "text": "a" * 1200, "prediction": "x", "predicted_spans": [{"start": 0, "end": 3}]}]
    )
    assert column(html, "predicted") == '<b>x</b>\n<mark class="wrong">aaa</mark>' + "a" * 1197


def test_a_long_text_without_marks_is_cut_at_its_end(tmp_path):
    html = body(tmp_path, {}, [{"where": "f:1", "text": "a" * 1300, "gold": "x", "prediction": "y"}])
    assert f'<div class="text">{"a" * 1200}… (100 more characters)</div>' in html


def test_marks_far_apart_do_not_make_the_text_long(tmp_path):
    spans = [{"start": 10, "end": 12, "type": "X"}, {"start": 9000, "end": 9002, "type": "X"}]
    html = body(tmp_path, {}, [{"where": "f:1", "text": "a" * 10_000, "gold_spans": spans}])
    assert column(html, "true").count("a") < 1300 and column(html, "true").count("<mark") == 1


def test_marks_that_overlap_are_written_once(tmp_path):
    spans = [{"start": 0, "end": 7, "type": "X"}, {"start": 4, "end": 7, "type": "Y"}]
    html = body(tmp_path, {}, [{"where": "f:1", "text": TEXT, "gold_spans": spans}])
    assert re.sub("<sub>.*?</sub>|<[^>]+>", "", column(html, "true")) == TEXT


def test_nothing_from_outside_acts(tmp_path):
    evil = "<script>x</script>\"'"
    span = {"start": len(evil), "end": 2 * len(evil), "type": evil}
    figures = classes.multi_label_metrics([[1], [0]], [[0.9], [0.2]], [evil])
    mistakes = [
        {"where": evil, "text": evil, "text_pair": evil, "gold": evil, "prediction": [evil], "probabilities": {evil: 0.5}},
        {"where": evil, "question": evil, "text": evil * 3, "gold_spans": [span], "predicted_spans": [span]},
    ]
    report = task_page.write(tmp_path, evil, figures, mistakes, {evil: evil, "notes": [evil], "command": evil})
    html = report.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "default-src 'none'" in html


def test_a_chart_has_a_text_of_what_it_shows(tmp_path):
    html = body(tmp_path)
    assert 'alt="Confusion matrix: counts, coloured by the share of the row. good is predicted as bad 1 times"' in html
    assert re.search(r'alt="Calibration: [^"]*\. [^"]*right at a confidence of 0\.7', html)


def test_half_a_letter_does_not_stop_the_page(tmp_path):
    assert "a ? b" in body(tmp_path, {}, [{"where": "f:1", "text": "a \ud800 b", "gold": "x", "prediction": "y"}])
