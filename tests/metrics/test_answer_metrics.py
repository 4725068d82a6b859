"""Metrics of generated answers against the libraries that define them."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.errors import MetricError, UserError
from tunesmith.metrics import answer_metrics, comparison, metric_names
from tunesmith.metrics.answer_metrics import Answered

TEXTS = [
    ("The cat sat on the mat.", ("The cat sat on the mat.", "A cat sat on a mat.")),
    ("It is raining in London today", ("In London it rains today.", "Rain today in London")),
    ("a a a a a a", ("Nothing of this.", "Something else")),
    ("", ("An empty answer.", "Nothing")),
]
ANSWERS = [Answered(text, references) for text, references in TEXTS]


def figure(name, answers=ANSWERS):
    metric = answer_metrics.table()[name]
    return float(metric.of_sums(metric.terms(answers).sum(axis=0, keepdims=True))[0])


@pytest.mark.parametrize("name, score", [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_corpus_scores_are_those_of_sacrebleu(name, score):
    references = [list(column) for column in zip(*(references for _, references in TEXTS))]
    assert figure(name) == pytest.approx(score([text for text, _ in TEXTS], references).score, rel=1e-12)
    korean = [Answered("고양이가 매트 위에 앉았다", ("고양이가 매트 위에 앉아 있다",))]
    expected = score([korean[0].text], [[korean[0].references[0]]]).score
    assert figure(name, korean) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name):
    scorer = RougeScorer([name])
    expected = [scorer.score_multi(references, text)[name].fmeasure for text, references in TEXTS]
    assert figure(name) == pytest.approx(np.mean(expected), rel=1e-12)


def test_rouge_reads_korean():
    one = Answered("고양이가 매트 위에 앉았다", ("고양이가 매트 위에 앉아 있다",))
    assert RougeScorer(["rouge1"]).score(one.references[0], one.text)["rouge1"].fmeasure == 0
    assert figure("rouge1", [one]) == pytest.approx(2 * 3 / (4 + 5))


def test_repetition_and_length_are_counted_by_hand():
    one = Answered("a b c d a b c d", tokens=8, stopped=False)  # abcd bcda cdab dabc abcd
    assert figure("repetition", [one]) == pytest.approx(1 / 5)
    assert figure("length", [one, Answered("", tokens=2)]) == 5
    assert figure("stopped", [one, Answered("")]) == 0.5


def test_systems_are_compared_without_their_answers():
    metric = answer_metrics.table()["bleu"]
    worse = [Answered("the", answer.references) for answer in ANSWERS] * 10
    before, after = metric.terms(worse), metric.terms(ANSWERS * 10)
    found = comparison.difference(before, after, of_sums=metric.of_sums)
    assert found.value == pytest.approx(figure("bleu") - figure("bleu", worse)) and found.low > 0
    assert found.p < 0.05


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no metric 'rougel'. Did you mean `rougeL`\?"):
        metric_names.of_names(["bleu", "rougel"])


# ------------------------------------------------------------------------------------- a function of the user


NUMBERS = itertools.count()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write ``lines`` into a module of the working directory, and return the import path of its function ``f``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(lines):
        name = f"own_metrics_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(f"def f(prompts, answers, references):\n    {lines}\n")
        return f"{name}:f"

    return write


def test_a_function_is_a_metric(written):
    call = written("return [len(p) + len(a) + len(r) for p, a, r in zip(prompts, answers, references)]")
    (found,) = metric_names.of_names([call]).items()
    assert found[0] == "f" and not found[1].needs_reference
    answers = [Answered("abc", ("x", "y"), prompt="p"), Answered("", prompt="question")]
    assert found[1].terms(answers).tolist() == [[6.0, 1.0], [8.0, 1.0]]


@pytest.mark.parametrize(
    "lines, words",
    [
        ("return [1.0]", r"f: expected 2 numbers, one for each answer, got int 1. Correct the function."),
        ("return 1.0", r"f: expected a list of 2 numbers, one for each answer, got float 1.0"),
        ("return [1.0, float('nan')]", r"expected a finite number for each answer, got float nan for the answer to row 7"),
        ("return [1.0, 'good']", r"expected a finite number for each answer, got str 'good' for the answer to row 7"),
        ("return [1 / len(answers[1])] * 2", r"f failed \(own_metrics_\d+.py, line 2\): ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_returns_no_numbers_stops(written, lines, words):
    (metric,) = metric_names.of_names([written(lines)]).values()
    with pytest.raises(MetricError, match=words) as error:
        metric.terms([Answered("abc", row=3), Answered("", row=7)])
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere_metrics:f", r"--metric: there is no module 'nowhere_metrics' in .*\n  Write the function into"),
        ("json:dump5", r"--metric: .*json.*has no function 'dump5'. Did you mean `dumps?`"),
        ("json:dumps", r"--metric: json:dumps cannot be called as f\(prompts, answers, references\)"),
        ("a b:c", r"--metric: expected MODULE:FUNCTION, such as my_metrics:brevity, got 'a b:c'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        metric_names.of_names([name])


def test_two_metrics_of_one_name_are_refused(written):
    first, second = written("return []"), written("return []")
    with pytest.raises(UserError, match="two metrics have the name 'f'"):
        metric_names.of_names([first, second])
