"""Exact match and F1 of answers, as SQuAD 1.1 and 2.0 define them (Rajpurkar et al. 2016 and 2018). From 0 to
1.

F1 counts words between white space. Chinese and Japanese write none, so an answer is one word and F1 equals
exact match. Korean joins particles to the noun, so the right noun with another particle counts as wrong.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from tunesmith.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower the case, then remove ASCII punctuation, English articles and repeated spaces, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the prediction is one of the answers, both normalised, else 0.0.

    A question without an answer (none given, or only answers that normalise to nothing) gives 1.0 exactly
    when the prediction is empty too.
    """
    return float(normalise(prediction) in {normalise(gold) for gold in _answers(golds)})


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the F1 of the words of the prediction and of an answer, for the answer where it is highest.

    Words count as often as they occur. A question without an answer: as in :func:`exact_match`.
    """
    return max(_word_f1(normalise(prediction).split(), normalise(gold).split()) for gold in _answers(golds))


def score(predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Return mean metrics over the questions of ``golds`` {id: answers}.

    No answers = the context does not answer the question; a prediction "" = no answer. Keys: exact_match, f1
    and total; the same with the prefixes ``has_answer_`` and ``no_answer_``, None where no question is of
    that kind; missing: questions without a prediction, which count as wrong. (The official script leaves
    those out.) Raises DataError without questions, and for a prediction to an unknown question.
    """
    if not golds:
        raise DataError("no question has a known answer: nothing to evaluate. Give questions with answers.")
    if unknown := predictions.keys() - golds.keys():
        raise DataError(f"there is a prediction for the question {min(unknown)!r}, which is not in the data")
    kinds: dict[str, list[tuple[float, float]]] = {"": [], "has_answer_": [], "no_answer_": []}
    for key, answers in golds.items():
        pair = (0.0, 0.0)
        if key in predictions:
            pair = exact_match(predictions[key], answers), f1(predictions[key], answers)
        kinds[""].append(pair)
        kinds["has_answer_" if has_answer(answers) else "no_answer_"].append(pair)
    metrics: dict[str, float | None] = {}
    for prefix, pairs in kinds.items():
        exact_mean, f1_mean = [sum(column) / len(pairs) for column in zip(*pairs)] or [None, None]
        metrics |= {f"{prefix}exact_match": exact_mean, f"{prefix}f1": f1_mean, f"{prefix}total": len(pairs)}
    return {**metrics, "missing": len(golds.keys() - predictions.keys())}


def has_answer(golds: Sequence[str]) -> bool:
    """Return whether any answer is not empty once it is normalised. Otherwise an empty prediction is correct.

    The official script asks before it normalises, which differs for answers of articles or punctuation alone.
    """
    return _answers(golds) != [""]


def best_null_threshold(
    null_minus_best: ArrayLike, best_metric: ArrayLike, answerable: ArrayLike
) -> tuple[float, float]:
    """Return (threshold, mean metric) of answering the questions whose score difference is at most this.

    All arguments have shape (n,): the score of "no answer" minus the score of the best answer, the exact
    match or F1 of the best answer, and whether the question has an answer. This is the official script's
    search, but questions with equal scores stay together. When answering none is best, the threshold is 0.0,
    or just below the lowest score if that score is at most 0. Raises DataError without questions.
    """
    scores, gained = np.asarray(null_minus_best, dtype=np.float64), np.asarray(best_metric, dtype=np.float64)
    nulls = ~np.asarray(answerable, dtype=bool)
    if not len(scores):
        raise DataError(
            "no question has a known answer: no threshold to choose. Give questions with answers."
        )
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    # One more answered question gains its metric and loses that of "no answer": 1 where that is correct.
    totals = nulls.sum() + (gained - nulls)[order].cumsum()
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    best = last[totals[last].argmax()]
    if not totals[best] > nulls.sum():
        none = 0.0 if scores[0] > 0 else float(np.nextafter(scores[0], -np.inf))
        return none, float(nulls.mean())
    return float(scores[best]), float(totals[best] / len(scores))


def _answers(golds: Sequence[str]) -> list[str]:
    """Return the answers that are not empty once normalised; [""], matched by "" alone, without any."""
    return [gold for gold in golds if normalise(gold)] or [""]


def _word_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    common = (Counter(prediction) & Counter(gold)).total()
    return 2 * common / (len(prediction) + len(gold))
