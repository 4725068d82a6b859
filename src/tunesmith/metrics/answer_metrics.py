"""Metrics of generated answers: overlap with references, length, repetition.

A metric maps answers with their references to terms, which are added over rows; ``of_sums`` turns the sums into
the figure, so that intervals and comparisons (``comparison``) need no answer again. Metrics of overlap lie
between 0 and 1, BLEU and chrF between 0 and 100, as their libraries print them. A metric may also be a function of
the user, named by its import path (``python_metric``).

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

from tunesmith.metrics import squad, sum_functions
from tunesmith.metrics.sum_functions import FUNCTIONS, OfSums

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

REPEATED = 4
"""Words of an n-gram of ``repetition`` (Welleck et al. 2019, arXiv:1908.04319, seq-rep-4)."""
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Answered:
    """A generated answer: its text, the accepted answers, its number of tokens, whether a stop token ended it.

    ``prompt``: the text that it answers, from row ``row`` of the data."""

    text: str
    references: tuple[str, ...] = ()
    tokens: int = 0
    stopped: bool = True
    prompt: str = ""
    row: int = 0


@dataclass(frozen=True)
class AnswerMetric:
    """``terms``: answers -> their terms, float64 (rows, k). ``function``: a name of ``sum_functions.FUNCTIONS``."""

    words: str
    better: Better
    terms: Callable[[Sequence[Answered]], np.ndarray]
    function: str = "ratio"
    needs_reference: bool = True

    @property
    def of_sums(self) -> OfSums:
        """Sums of terms (n, k) -> figures (n,)."""
        return FUNCTIONS[self.function]


@cache
def table() -> dict[str, AnswerMetric]:
    """Return all metrics by name, in the order in which they are shown."""
    overlap = {
        "exact_match": ("share of answers equal to a reference", _exact),
        "token_f1": ("F1 of words", _token_f1),
        **{f"rouge{kind}": (f"ROUGE-{kind}, F-measure", _rouge(f"rouge{kind}")) for kind in "12L"},
    }
    alone: dict[str, tuple[str, Better, Callable[[Answered], float]]] = {
        "stopped": ("share ended by a stop token", "higher", lambda one: float(one.stopped)),
        "length": ("tokens of an answer", "neither", lambda one: float(one.tokens)),
        "repetition": ("share of 4-grams seen before in the answer", "lower", _repetition),
    }
    return {
        **{name: AnswerMetric(words, "higher", _mean(value)) for name, (words, value) in overlap.items()},
        "bleu": AnswerMetric("BLEU of the corpus", "higher", _statistics(sum_functions.bleu_scorer), "bleu"),
        "chrf": AnswerMetric("chrF2 of the corpus", "higher", _statistics(sum_functions.chrf_scorer), "chrf"),
        **{
            name: AnswerMetric(words, better, _mean(value), needs_reference=False)
            for name, (words, better, value) in alone.items()
        },
    }


def _mean(value: Callable[[Answered], float]) -> Callable[[Sequence[Answered]], np.ndarray]:
    return lambda answers: np.array([(value(one), 1.0) for one in answers], np.float64).reshape(-1, 2)


def _exact(answer: Answered) -> float:
    return squad.exact_match(answer.text, answer.references)


def _token_f1(answer: Answered) -> float:
    return squad.f1(answer.text, answer.references)


def word_grams(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _repetition(answer: Answered) -> float:
    grams = word_grams(answer.text, REPEATED)
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


def _statistics(scorer: Callable[[], BLEU | CHRF]) -> Callable[[Sequence[Answered]], np.ndarray]:
    """Return the terms of a score that sacrebleu computes from statistics of a whole corpus."""
    return lambda answers: np.array([_added(scorer(), one) for one in answers], np.float64)


def _added(metric: BLEU | CHRF, answer: Answered) -> Sequence[float]:
    """Return what sacrebleu adds over the rows of a corpus. It has no public function for this."""
    references = [[text] for text in answer.references or ("",)]
    (found,) = metric._extract_corpus_statistics([answer.text], references)
    return [float(value) for value in found]
