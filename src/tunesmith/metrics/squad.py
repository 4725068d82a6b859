"""Exact match and F1 of answers, by the definitions of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016 and 2018). Shares from 0 to 1.

F1 counts words between white space. Where writing has none (Chinese, Japanese) an answer is one word, so F1 equals exact match;
where particles join their noun (Korean), the right noun with another particle counts as wrong.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, golds: Sequence[str]) -> float:
    """1.0 when the prediction is one of the answers, both normalised, else 0.0.

    Without any answer (none given, or only such as normalise to nothing) 1.0 exactly when the prediction is empty too.
    """
    return float(normalise(prediction) in {normalise(gold) for gold in _answers(golds)})


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The harmonic mean of the shares of words found and right, of the answer where it is highest.

    Words are counted as often as they occur. No answer: as in :func:`exact`.
    """
    return max(_overlap(normalise(prediction).split(), normalise(gold).split()) for gold in _answers(golds))


def score(predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Means over the questions of ``golds`` {id: its answers, none = the context does not say}; a prediction "" = no answer.

    Returns exact_match, f1 and total, the same for the questions with (``has_answer_``) and without an answer (``no_answer_``),
    None where there are none of that kind, and missing: questions without a prediction, which are wrong. (The official script
    leaves those out.) Raises DataError without questions, and for a prediction to a question that is not there.
    """
    if not golds:
        raise DataError(
            "There is nothing to measure: no question has a known answer. Give questions with answers."
        )
    if unknown := predictions.keys() - golds.keys():
        raise DataError(f"There is a prediction for the question {min(unknown)!r}, which is not in the data.")
    kinds: dict[str, list[tuple[float, float]]] = {"": [], "has_answer_": [], "no_answer_": []}
    for key, answers in golds.items():
        said = predictions.get(key)
        pair = (0.0, 0.0) if said is None else (exact(said, answers), f1(said, answers))
        kinds[""].append(pair)
        kinds["has_answer_" if has_answer(answers) else "no_answer_"].append(pair)
    figures: dict[str, Any] = {}
    for prefix, pairs in kinds.items():
        means = [sum(column) / len(pairs) for column in zip(*pairs)] or [None, None]
        figures |= {f"{prefix}exact_match": means[0], f"{prefix}f1": means[1], f"{prefix}total": len(pairs)}
    return {**figures, "missing": len(golds.keys() - predictions.keys())}


def has_answer(golds: Sequence[str]) -> bool:
    """Whether any answer says something once it is normalised; where none does, an empty prediction is right. (The official
    script asks before normalising, which differs for answers of articles or punctuation alone.)"""
    return _answers(golds) != [""]


def best_null_threshold(null_minus_best: Any, of_best: Any, answerable: Any) -> tuple[float, float]:
    """(threshold, mean score there): a question is answered when its ``null_minus_best`` is not above the threshold.

    All arguments are (n,): the score of "no answer" minus that of the best answer, the exact match or F1 of the best answer, and
    whether the question has one. As the official script's search, except that questions of one score stand on one side. Where
    answering none is best the threshold is 0.0, or just below the lowest score when that is not above 0.
    Raises DataError without questions.
    """
    scores, gained = np.asarray(null_minus_best, dtype=np.float64), np.asarray(of_best, dtype=np.float64)
    nulls = ~np.asarray(answerable, dtype=bool)
    if not len(scores):
        raise DataError(
            "There is no question to choose a threshold by. Give questions whose answers are known."
        )
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    # Answering one more question gains its score and loses what "no answer" would have had: 1 where that is right.
    totals = nulls.sum() + (gained - nulls)[order].cumsum()
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    best = last[totals[last].argmax()]
    if not totals[best] > nulls.sum():
        none = 0.0 if scores[0] > 0 else float(np.nextafter(scores[0], -np.inf))
        return none, float(nulls.mean())
    return float(scores[best]), float(totals[best] / len(scores))


def _answers(golds: Sequence[str]) -> list[str]:
    """Those that say something; "" where none does, which only an empty prediction meets."""
    return [gold for gold in golds if normalise(gold)] or [""]


def _overlap(said: Sequence[str], gold: Sequence[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    same = (Counter(said) & Counter(gold)).total()
    return 2 * same / (len(said) + len(gold))
