"""Pages in Korean: every text has a translation, nothing English is left, and what files record is translated by its template."""

from __future__ import annotations

import ast
import html
import json
import re
import string
import warnings
from pathlib import Path

import pytest

from tests.report import test_pipeline_page
from tests.report.test_run_page import run  # noqa: F401 - a fixture
from tunesmith.cli.main import main
from tunesmith.metrics import win_rate
from tunesmith.report import charts, compare_page, judge_page, korean_pages, korean_records, language, pipeline_page, task_page
from tunesmith.report.run_page import write_report
from tunesmith.runs import assessment, overfit

ROOM = Path(language.__file__).parent
CHOSEN_BY_A_NAME = {
    *("better", "worse", "no difference seen", "before", "after", "first", "between"),
    *("sampling", "scoring", "log-probabilities", "update", "tokens", "step"),
    *("stage", "objective", "adaptation", "trained from", "steps", "time", "peak memory"),
    *("{value} by always taking the longer one", "{value} by always taking the shorter one"),
}
"""Texts that a variable names where ``t`` is called."""
ENGLISH = re.compile(r"\b[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}")
"""Three English words in a row."""


@pytest.fixture
def korean(monkeypatch):
    monkeypatch.setenv(language.VARIABLE, "ko")


def asked_texts():
    """Every text that a page gives to ``t``."""
    found = set()
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.func if isinstance(node, ast.Call) else None
            named = isinstance(name, ast.Name) and name.id == "t"
            if named and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    for path in (ROOM / "templates").glob("*.html"):
        found |= set(map(ast.literal_eval, re.findall(r'\bt\(("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8"))))
    return found


def places(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_every_text_of_a_page_is_in_both_languages_and_no_translation_is_left_over():
    assert asked_texts() | CHOSEN_BY_A_NAME == korean_pages.TEXTS.keys()
    assert sum(map(len, korean_pages.PAGES.values())) == len(korean_pages.TEXTS), "a text is in two tables"
    for english, text in korean_pages.TEXTS.items():
        assert places(english) == places(text), english
        assert re.search("[가-힣]", text) or text == ", ", english
    assert korean_pages.ENGLISH.keys() <= korean_pages.TEXTS.keys()


def test_a_recorded_sentence_keeps_its_places():
    for english, text in korean_records.SENTENCES.items():
        assert set(places(text)) == set(re.findall(r"\{(\w+)\}", english)), english
    assert language.translation("a sentence that nobody knows") is None


def text_of(page):
    """The text that a reader sees, without that of the data, the recipe and the dump of the manifest."""
    shown = re.sub(
        r"<style>.*?</style>|<svg.*?</svg>|<pre>.*?</pre>|<code.*?</code>|<dd>.*?</dd>|<dt>.*?</dt>", " ", page, flags=re.S
    )
    labels = re.findall(r'(?:alt|aria-label)="([^"]*)"', shown)
    return html.unescape("\n".join([re.sub(r"<[^>]+>", "\n", shown), *labels]))


def english_in(page):
    return [found for found in ENGLISH.findall(text_of(page)) if "model </title" not in found]


FIGURE = {"value": 0.25, "low": 0.1, "high": 0.4, "rows": 60}
BETTER = {
    "value": 0.15, "low": 0.02, "high": 0.28, "p": 0.01, "rows": 60, "clusters": 50, "detectable": 0.12, "before": 0.25,
    "after": 0.4, "higher_is_better": True, "better": True,
}  # fmt: skip
EQUAL = BETTER | {"value": 0.0, "low": -0.1, "high": 0.1, "better": None, "p": 0.8}


def compared():
    from tunesmith.evaluate import compare_models

    pair = {
        "first": "A", "second": "B", "figures": {"answer_rougeL": BETTER, "eval_loss": EQUAL}, "rows_better": 1, "rows_worse": 1,
        "better_rows": [{"row": 3, "before": 0.1, "after": 0.9, "text": "질문", "answers": ["가", "나"]}], "worse_rows": [],
    }  # fmt: skip
    verdicts = [compare_models._verdict(pair, name, None)[0] for name in ("answer_rougeL", "eval_loss", "nothing")]
    few = pair | {"figures": {"eval_loss": EQUAL | {"low": None, "high": None}}}
    verdicts.append(compare_models._verdict(few, "eval_loss", 0.1)[0])
    system = {"parameters": 10**8, "bytes": 10**8, "tokens_per_second": 90.0, "figures": {"answer_rougeL": FIGURE}}
    return verdicts, {
        "systems": [{"name": "A", **system}, {"name": "B", **system}], "pairs": [pair | {"verdict": verdicts[0]}],
        "decides": "answer_rougeL", "rows": 60, "prompts": 50, "data": "data.json",
        "cautions": ["the tokenizers differ, so losses per token are left out"],
    }  # fmt: skip


@pytest.mark.usefixtures("not_drawn")
def test_a_comparison_has_no_english_sentence(tmp_path, korean):
    verdicts, result = compared()
    assert all(language.translation(line) for line in verdicts)
    page = compare_page.write(tmp_path, result).read_text(encoding="utf-8")
    assert english_in(page) == [] and '<html lang="ko">' in page
    assert (
        "B 쪽이 A보다 낫습니다: 답변 ROUGE-L 0.25 → 0.4, 차이 0.15 (0.02 ~ 0.28), p = 0.01, 행 60개 (서로 다른 프롬프트 50개)"
        in page
    )


def test_a_judged_comparison_has_no_english_sentence(tmp_path, korean):
    from tunesmith.judge import examination, judge_run

    figures = {"kappa": 0.1, "first": 0.9, "longer": 0.9, "longer_is_better": 0.5, "retest": 0.5, "missing": 0.2}
    failures = examination._failures(figures) + examination._failures(figures | {"first": 0.1, "longer": 0.1})
    examined = {
        **figures,
        "pairs": 48,
        "kappa_low": 0.0,
        "kappa_high": 0.2,
        "agreement": 0.5,
        "failures": failures,
        "passed": False,
    }
    rate = {"value": 0.7, "low": 0.6, "high": 0.8}
    one = {
        "first": "A", "second": "B", "pairs": 60, "missing": 0, "wins": 40, "ties": 2, "losses": 18, "win_rate": rate, "p": 0.01,
        "length_controlled": rate, "length": win_rate.length_controlled([0, 1] * 15, [*range(30)])[1], "rows_for_ten_points": 200,
        "rows": [{"row": 1, "prompt": "질문", "first": "가", "second": "나", "outcome": "second"}],
        "scores": {"first": 3.0, "second": 3.5, "difference": {"value": 0.5, "low": 0.2, "high": 0.8}},
    }  # fmt: skip
    verdicts = []
    for passed, changes in ((True, {}), (True, {"p": 0.9}), (False, {}), (True, {"win_rate": None})):
        exam = type("", (), {"passed": passed})
        verdicts.append(judge_run._verdict(one | changes, exam)[0])
        verdicts.append(judge_run._verdict({key: value for key, value in (one | changes).items() if key != "scores"}, exam)[0])
    verdicts += [win_rate.length_controlled([1.0] * 3, [1.0] * 3)[1], win_rate.length_controlled([1.0] * 30, [1.0] * 30)[1]]
    verdicts += [win_rate.length_controlled([0.0] * 15 + [1.0] * 15, [-1.0] * 15 + [1.0] * 15)[1], *failures]
    assert [line for line in verdicts if not language.translation(line)] == []
    cost = {"calls": 10, "tokens": 100, "seconds": 3.0, "reused": 0}
    result = {
        "systems": ["A", "B"], "judge": "J", "examination": examined, "cost": cost, "comparisons": [one | {"verdict": verdicts[4]}]
    }  # fmt: skip
    page = judge_page.write(tmp_path, result).read_text(encoding="utf-8")
    assert english_in(page) == [] and "심판이 시험을 통과하지 못해 승자를 정하지 않습니다. B의 승률 70% (60% ~ 80%)" in page


@pytest.mark.usefixtures("not_drawn")
def test_the_report_of_a_run_has_no_english_sentence(run, korean):  # noqa: F811
    file = run / "manifest.json"
    manifest = json.loads(re.sub(r"</title>.*?'&", "", file.read_text(encoding="utf-8")))
    manifest["notes"] = ["resumed after step 20"]
    manifest["data"]["contaminated"] = {"rows": 3, "share": 0.1, "letters": 60, "first": []}
    verdict = "better than before training: loss 2.114 -> 1.462, a change of -0.653 (-0.7 to -0.6) over 96 held-out rows"
    manifest["result"]["assessment"] = {"verdict": [verdict], "figures": {}}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert english_in(page) == []
    assert "학습 전보다 좋아졌습니다: 손실 2.114 → 1.462, 변화 -0.653 (95% 구간 -0.7 ~ -0.6), 평가용 행 96개." in page
    assert "20스텝 뒤에서 이어서 학습했습니다" in page and "668토큰/초" in page
    manifest["notes"] = ["a note of a later version"]
    file.write_text(json.dumps(manifest), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert page.index("기록된 그대로(영어)") < page.index("a note of a later version"), "an unknown note is not lost"


def test_a_pipeline_and_an_evaluation_have_no_english_sentence(tmp_path, korean, monkeypatch):
    monkeypatch.setattr(charts, "png", lambda figure: b"\x89PNG" + bytes(20))
    facts = json.loads(
        json.dumps(test_pipeline_page.FACTS).replace("better <than> before", "it gives every answer the same reward")
    )
    facts["comparison"]["prompts"][0]["prompt"] = "질문"
    assert english_in(pipeline_page.write(tmp_path, facts).read_text(encoding="utf-8")) == []
    confused = [[3, 1], [2, 4]]
    measures = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4}
    figures = {"accuracy": 0.7, "baseline": 0.5, "confusion": confused, "per_class": {"가": measures, "나": measures}}
    mistakes = [{"where": "a.json:3", "text": "글", "gold": "가", "prediction": "나", "loss": 2.5, "alike": 3}]
    baseline = {"words": "always 가, the most frequent", "value": 0.5}
    assessed = {
        "verdict": ["it predicts one class only, 가, for all 9 rows"],
        "figures": {"eval_accuracy": FIGURE | {"baseline": baseline}},
    }
    page = task_page.write(tmp_path, "모델", figures, mistakes, {"notes": ["2 bad rows were left out"]}, assessed)
    assert english_in(page.read_text(encoding="utf-8")) == [] and "항상 가장 흔한 가" in page.read_text(encoding="utf-8")


def test_verdicts_of_runs_are_known():
    lines = []
    for before, after, always in (([0, 1] * 40, [1] * 80, [0] * 80), ([1] * 80, [0, 1] * 40, [1] * 80), ([1] * 9, [1] * 9, None)):
        sides = [
            assessment.RowFigure({(0, row): (float(value), 1.0) for row, value in enumerate(side or ())})
            for side in (before, after, always)
        ]
        rule = {"eval_accuracy": {"words": "always good, the most frequent", "value": 0.5, "rows": sides[2]}} if always else {}
        groups = {place: place[1] // 2 for place in sides[0].rows}
        kept = [json.loads(json.dumps(assessment.measured(1, {"eval_accuracy": one}, rule, [], groups))) for one in sides[:2]]
        for groupless in (False, True):
            for one in kept:
                one["clusters"] = [] if groupless else one["clusters"]
            lines += assessment.assess(kept[1], kept[0], "eval_accuracy")["verdict"]
            lines += assessment.assess(kept[0], kept[0], "eval_accuracy")["verdict"]
    records = [
        {"kind": "eval", "step": step, "eval_loss": loss, "eval_loss_stderr": 0.01} for step, loss in enumerate((2, 1, 3, 4))
    ]
    records += [{"kind": "train", "step": step, "loss": 5.0 - step} for step in range(4)]
    lines.append(overfit.detect(records).text)
    assert len(set(lines)) > 5 and [line for line in lines if not language.translation(line)] == []


def test_warnings_of_runs_that_sample_are_known():
    """The sentences are those of the source, with a number in the place of each figure."""
    tree = ast.parse((ROOM.parent / "rollout" / "rollout_warnings.py").read_text(encoding="utf-8"))
    returned = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr | ast.Constant)
    ]
    found = []
    for value in returned:
        parts = value.values if isinstance(value, ast.JoinedStr) else [value]
        names = [ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else str(part.value) for part in parts]
        words = ["objective.beta" if name == "kl_key" else "grew" if "grew" in name else name for name in names]
        is_place = [isinstance(part, ast.FormattedValue) for part in parts]
        text = "".join(
            "1.5" if place and word not in ("objective.beta", "grew") else word for place, word in zip(is_place, words)
        )
        if len(text) > 60:
            found.append(text)
    assert len(found) == 6 and [line for line in found if not language.translation(f"step 3: warning: {line}")] == []
    assert not any(ENGLISH.search(language.translation(line).replace("objective.", "")) for line in found)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "en"),
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "ko_KR.UTF-8", language.VARIABLE: "en"}, "en"),
        ({"LANG": "en_US.UTF-8", language.VARIABLE: "ko"}, "ko"),
    ],
)
def test_the_language_is_the_one_that_is_set_or_that_of_the_locale(variables, expected, monkeypatch):
    for name in (language.VARIABLE, "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language.current() == expected


@pytest.mark.usefixtures("not_drawn")
def test_runs_report_writes_the_page_again_in_the_language_of_the_flag(run, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv(language.VARIABLE, "en")
    assert main(["runs", "report", str(run)]) == 0 and 'lang="en"' in (run / "report.html").read_text(encoding="utf-8")
    assert main(["runs", "report", str(run), "--language", "ko", "--json"]) == 0
    assert 'lang="ko"' in (run / "report.html").read_text(encoding="utf-8")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"] == str(run / "report.html")


def test_a_chart_is_korean_where_a_font_has_its_letters_and_english_elsewhere(korean, monkeypatch):
    measures = {"class": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter that no font has
        for lacks in (set(), {"가"}):
            known = charts.fonts_of("가나다라")
            if lacks or not known[1]:
                monkeypatch.setattr(charts, "fonts_of", lambda letters, known=known, lacks=lacks: (known[0], lacks))
                figure = charts.per_class(measures)
                charts.png(figure)
                label = figure.axes[0].get_xlabel()
                assert label.startswith("share" if lacks else "비율"), label
