"""Metrics of generated answers against the libraries that define them."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.errors import UserError
from tunesmith.metrics import answer_metrics, comparison
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
    return float(metric.of_sums(answer_metrics.terms(metric, answers).sum(axis=0, keepdims=True))[0])


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
    assert answer_metrics.distinct([one], 1) == 4 / 8
    assert answer_metrics.distinct([Answered("")], 2) == 0


def test_systems_are_compared_without_their_answers():
    metric = answer_metrics.table()["bleu"]
    worse = [Answered("the", answer.references) for answer in ANSWERS] * 10
    before, after = answer_metrics.terms(metric, worse), answer_metrics.terms(metric, ANSWERS * 10)
    found = comparison.difference(before, after, of_sums=metric.of_sums)
    assert found.value == pytest.approx(figure("bleu") - figure("bleu", worse)) and found.low > 0
    assert found.p < 0.05


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no metric 'rougel'. Did you mean `rougeL`\?"):
        answer_metrics.of_names(["bleu", "rougel"])
