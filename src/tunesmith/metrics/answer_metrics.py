"""Metrics of generated answers: overlap with references, length, repetition.

A metric maps an answer and its references to terms, which are added over rows; ``of_sums`` turns the sums into
the figure, so that intervals and comparisons (``comparison``) need no answer again. Metrics of overlap lie
between 0 and 1, BLEU and chrF between 0 and 100, as their libraries print them.

BLEU and chrF are sacrebleu's, with its default tokenizer "13a" (Post 2018), which splits Korean at spaces.
ROUGE is rouge-score's, the F-measure of the best reference. Its default tokenizer drops every letter outside
ASCII, so an answer in Korean would have ROUGE 0. The tokenizer here keeps all letters and digits. On ASCII text
both are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.errors import UserError
from tunesmith.metrics import squad
from tunesmith.metrics.sum_functions import OfSums, ratio
from tunesmith.suggestions import did_you_mean

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

REPEATED = 4
"""Words of an n-gram of ``repetition`` (Welleck et al. 2019, arXiv:1908.04319, seq-rep-4)."""
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Answered:
    """A generated answer: its text, the accepted answers, its number of tokens, whether a stop token ended it."""

    text: str
    references: tuple[str, ...] = ()
    tokens: int = 0
    stopped: bool = True


@dataclass(frozen=True)
class AnswerMetric:
    """``terms``: an answer -> its terms, (k,). ``of_sums``: sums of terms (n, k) -> figures (n,)."""

    words: str
    better: Better
    terms: Callable[[Answered], Sequence[float]]
    of_sums: OfSums = ratio
    needs_reference: bool = True


def of_names(names: Sequence[str]) -> dict[str, AnswerMetric]:
    """Return the metrics of these names. Raises UserError for an unknown name, with the nearest one."""
    known = table()
    for name in names:
        if name not in known:
            raise UserError(f"there is no metric {name!r}. {did_you_mean(name, known)}")
    return {name: known[name] for name in names}


def terms(metric: AnswerMetric, answers: Sequence[Answered]) -> np.ndarray:
    """Return the terms (rows, k) of ``answers``."""
    return np.array([metric.terms(answer) for answer in answers], np.float64)


@cache
def table() -> dict[str, AnswerMetric]:
    """Return all metrics by name, in the order in which they are shown."""
    return {
        "exact_match": AnswerMetric("share of answers equal to a reference", "higher", _mean(_exact)),
        "token_f1": AnswerMetric("F1 of words", "higher", _mean(_token_f1)),
        "rouge1": AnswerMetric("ROUGE-1, F-measure", "higher", _mean(_rouge("rouge1"))),
        "rouge2": AnswerMetric("ROUGE-2, F-measure", "higher", _mean(_rouge("rouge2"))),
        "rougeL": AnswerMetric("ROUGE-L, F-measure", "higher", _mean(_rouge("rougeL"))),
        "bleu": AnswerMetric("BLEU of the corpus", "higher", lambda one: _statistics(_bleu(), one),
            lambda sums: _of_statistics(_bleu(), sums),
        ),
        "chrf": AnswerMetric("chrF2 of the corpus", "higher", lambda one: _statistics(_chrf(), one),
            lambda sums: _of_statistics(_chrf(), sums),
        ),
        "stopped": AnswerMetric(
            "share ended by a stop token", "higher", _mean(lambda one: float(one.stopped)), needs_reference=False
        ),
        "length": AnswerMetric(
            "tokens of an answer", "neither", _mean(lambda one: float(one.tokens)), needs_reference=False
        ),
        "repetition": AnswerMetric(
            "share of 4-grams seen before in the answer", "lower", _mean(_repetition), needs_reference=False
        ),
    }  # fmt: skip


def distinct(answers: Sequence[Answered], length: int) -> float:
    """Return distinct-n: the share of different n-grams of words in all answers (Li et al. 2016,
    arXiv:1510.03055). It is no sum over rows, so it has no interval, and it falls with the number of rows."""
    found = [gram for one in answers for gram in _grams(one.text, length)]
    return len(set(found)) / len(found) if found else 0.0


def _mean(value: Callable[[Answered], float]) -> Callable[[Answered], Sequence[float]]:
    return lambda answer: (value(answer), 1.0)


def _exact(answer: Answered) -> float:
    return squad.exact_match(answer.text, answer.references)


def _token_f1(answer: Answered) -> float:
    return squad.f1(answer.text, answer.references)


def _grams(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _repetition(answer: Answered) -> float:
    grams = _grams(answer.text, REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class _Letters:
    """Tokenizer for rouge-score: runs of letters and digits of any script, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge(name: str) -> Callable[[Answered], float]:
    def value(answer: Answered) -> float:
        scores = _rouge_scorer().score_multi(answer.references or ("",), answer.text)
        return float(scores[name].fmeasure)

    return value


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Letters())


@cache
def _bleu() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _statistics(metric: BLEU | CHRF, answer: Answered) -> Sequence[float]:
    """Return what sacrebleu adds over the rows of a corpus. It has no public function for this."""
    references = [[text] for text in answer.references or ("",)]
    (found,) = metric._extract_corpus_statistics([answer.text], references)
    return [float(value) for value in found]


def _of_statistics(metric: BLEU | CHRF, sums: np.ndarray) -> np.ndarray:
    return np.array([metric._compute_score_from_stats([int(one) for one in row]).score for row in sums])
