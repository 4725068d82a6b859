"""Figures of the answers that a language model generates: intervals, a baseline, and the worst answers to read.

The baseline is the prompt itself, copied as the answer: overlap with a reference is often high for it, because
references repeat words of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from tunesmith.evaluate.prompt_answers import PromptAnswer
from tunesmith.json_types import JsonObject
from tunesmith.metrics import answer_metrics, comparison
from tunesmith.metrics.answer_metrics import AnswerMetric

WORST = 10


def usable(answers: Sequence[PromptAnswer], metrics: Mapping[str, AnswerMetric]) -> dict[str, AnswerMetric]:
    """Return the metrics that these answers allow: those of overlap need a reference in every row."""
    known = all(one.answered.references for one in answers)
    return {name: metric for name, metric in metrics.items() if known or not metric.needs_reference}


def answer_figures(answers: Sequence[PromptAnswer], metrics: Mapping[str, AnswerMetric]) -> JsonObject:
    """Return the figures of ``answers`` by name, and the worst answers by the first metric.

    A figure has ``value``, ``low`` and ``high`` (95%, over prompts), ``words``, and for metrics of overlap
    ``baseline``: the value of the copied prompt and whether the answers are ``better``, by an interval of the
    difference. ``distinct_1`` and ``distinct_2`` have no interval.
    """
    figures: JsonObject = {}
    prompts = [one.prompt for one in answers]
    copied = [replace(one.answered, text=one.prompt) for one in answers]
    chosen = usable(answers, metrics)
    for name, metric in chosen.items():
        terms = answer_metrics.terms(metric, [one.answered for one in answers])
        interval = comparison.interval(terms, prompts, metric.of_sums)
        value = float(metric.of_sums(terms.sum(axis=0)[None])[0])
        figures[name] = {**(asdict(interval) if interval else {"value": value}), "words": metric.words}
        if metric.needs_reference:
            figures[name]["baseline"] = _baseline(
                metric, answer_metrics.terms(metric, copied), terms, prompts
            )
    for length in (1, 2):
        value = answer_metrics.distinct([one.answered for one in answers], length)
        words = f"share of different {'words' if length == 1 else 'pairs of words'} in all answers"
        figures[f"distinct_{length}"] = {"value": value, "words": words}
    return {
        "answers": len(answers),
        "prompts": len(set(prompts)),
        "figures": figures,
        "worst": _worst(answers, chosen),
    }


def _baseline(
    metric: AnswerMetric, copied: np.ndarray, terms: np.ndarray, prompts: Sequence[str]
) -> JsonObject:
    found = comparison.difference(copied, terms, prompts, metric.of_sums)
    value = float(metric.of_sums(copied.sum(axis=0)[None])[0])
    better = None if found is None or found.low <= 0 <= found.high else found.value > 0
    return {"words": "the prompt copied", "value": value, "better": better}


def _worst(answers: Sequence[PromptAnswer], metrics: Mapping[str, AnswerMetric]) -> list[JsonObject]:
    """Return the answers with the lowest F1 of words with their reference; without references, those that
    repeat themselves most."""
    name = "token_f1" if "token_f1" in metrics else "repetition"
    metric = metrics.get(name) or answer_metrics.table()[name]
    sign = -1 if metric.better == "lower" else 1
    values = [sign * float(metric.of_sums(np.array([metric.terms(one.answered)]))[0]) for one in answers]
    order = np.argsort(values, kind="stable")[:WORST]
    return [
        {
            "row": answers[place].row, "prompt": answers[place].prompt, "answer": answers[place].answered.text,
            "references": list(answers[place].answered.references), name: sign * values[place],
        }
        for place in order
    ]  # fmt: skip
