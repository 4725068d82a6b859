"""Figures of generated answers: intervals, baselines, and the worst answers to read.

``evaluate --generate``, ``compare`` and the evaluations of a run use these figures. Answers are added in blocks,
and no text is kept but that of the worst answers, so memory hardly grows with the number of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.metrics import answer_metrics, comparison
from tunesmith.metrics.answer_metrics import Answered, AnswerMetric, word_grams

WORST = 10
COPIED = "the prompt copied"
"""The baseline that answers with the prompt: overlap with a reference is often high, because references repeat
words of the prompt."""


class AnswerTerms:
    """The terms of each metric for each answer. ``rows``: the row of each answer; ``clusters``: a hash of its prompt."""

    def __init__(self, metrics: Mapping[str, AnswerMetric]) -> None:
        self.metrics = dict(metrics)
        self.rows = np.zeros(0, np.int64)
        self.clusters = np.zeros(0, np.uint64)
        self.referenced = np.zeros(0, np.bool_)
        """bool (answers,): whether the data have an answer to compare with."""
        self._terms: dict[str, list[np.ndarray]] = {name: [] for name in metrics}

    def add(self, answers: Sequence[Answered]) -> None:
        """Measure ``answers``. A metric of overlap skips those without a reference."""
        if not answers:
            return
        referenced = [one for one in answers if one.references]
        for name, metric in self.metrics.items():
            measured = referenced if metric.needs_reference else answers
            if measured:
                self._terms[name].append(metric.terms(measured))
        self.rows = np.append(self.rows, [one.row for one in answers])
        hashes = np.array([_hash(one.prompt) for one in answers], np.uint64)
        self.clusters = np.append(self.clusters, hashes)
        self.referenced = np.append(self.referenced, [bool(one.references) for one in answers])

    @property
    def measured(self) -> dict[str, AnswerMetric]:
        """The metrics that have a figure: without any reference, there is no overlap."""
        return {name: metric for name, metric in self.metrics.items() if self._terms[name]}

    def terms(self, name: str) -> np.ndarray:
        """Return the terms (answers, k) of a metric, for the answers of ``places``."""
        return np.concatenate(self._terms[name])

    def places(self, name: str) -> np.ndarray:
        """Return the places of the answers that a metric measures."""
        return (
            np.flatnonzero(self.referenced)
            if self.metrics[name].needs_reference
            else np.arange(len(self.rows))
        )

    def value(self, name: str) -> float:
        sums = np.sum([block.sum(axis=0) for block in self._terms[name]], axis=0)
        return float(self.metrics[name].of_sums(sums[None])[0])


class ModelAnswers(AnswerTerms):
    """The terms of a model's answers, how many different words they have, and the worst ones to read."""

    def __init__(self, metrics: Mapping[str, AnswerMetric]) -> None:
        super().__init__(metrics)
        self.distinct = {length: DistinctGrams(length) for length in (1, 2)}
        self.worst: list[tuple[float, Answered]] = []
        """(F1 of words, answer) of the answers with the lowest F1."""
        self.repetitive: list[tuple[float, Answered]] = []
        """(repetition, answer) of the answers without a reference that repeat themselves most."""

    def add(self, answers: Sequence[Answered]) -> None:
        super().add(answers)
        for grams in self.distinct.values():
            grams.add([one.text for one in answers])
        self.worst = _keep(self.worst, "token_f1", [one for one in answers if one.references], 1)
        others = [one for one in answers if not one.references]
        self.repetitive = _keep(self.repetitive, "repetition", others, -1)


class DistinctGrams:
    """Distinct-n: the share of different n-grams of words in all answers (Li et al. 2016, arXiv:1510.03055).

    It is no sum over rows, so it has no interval, and it falls with the number of rows. Of each n-gram a hash of
    8 bytes is kept."""

    def __init__(self, length: int) -> None:
        self.length, self.count = length, 0
        self._seen = np.zeros(0, np.uint64)

    def add(self, texts: Sequence[str]) -> None:
        grams = (" ".join(gram) for text in texts for gram in word_grams(text, self.length))
        hashes = np.fromiter(map(_hash, grams), np.uint64)
        self.count += len(hashes)
        self._seen = np.union1d(self._seen, hashes)

    @property
    def share(self) -> float:
        return len(self._seen) / self.count if self.count else 0.0


def rewritten(answers: Sequence[Answered], text: str | None) -> list[Answered]:
    """Return the answers of a rule to the same prompts: always ``text``, or the prompt itself for None."""
    return [
        Answered(one.prompt if text is None else text, one.references, prompt=one.prompt, row=one.row)
        for one in answers
    ]


def metrics_of_texts(metrics: Mapping[str, AnswerMetric]) -> dict[str, AnswerMetric]:
    """Return the metrics that a rule without a model can have: its answer has no tokens and no end of its own."""
    of_models = {name for name, metric in answer_metrics.table().items() if not metric.needs_reference}
    return {name: metric for name, metric in metrics.items() if name not in of_models}


def answer_figures(answers: ModelAnswers, baselines: Mapping[str, AnswerTerms]) -> JsonObject:
    """Return the figures of ``answers`` by name, and the worst answers.

    A figure has ``value``, ``rows``, ``low`` and ``high`` (95%, over prompts, for ``comparison.FEWEST`` prompts or
    more), ``words``, and ``baselines``: for each of ``baselines`` (name -> its terms over the same rows) its
    ``words`` and ``value``, the ``difference`` with ``low`` and ``high``, and whether the answers are ``better``.
    ``distinct_1`` and ``distinct_2`` have no interval.
    """
    figures: JsonObject = {}
    for name, metric in answers.measured.items():
        clusters = answers.clusters[answers.places(name)].tolist()
        terms = answers.terms(name)
        interval = comparison.interval(terms, clusters, metric.of_sums)
        known = {"value": answers.value(name), "rows": len(terms)}
        if interval is not None:
            known = asdict(interval)
        compared = [
            _against(words, other, name, terms, clusters)
            for words, other in baselines.items()
            if name in other.measured
        ]
        figures[name] = {**known, "words": metric.words, "baselines": compared}
    for length, grams in answers.distinct.items():
        words = f"share of different {'words' if length == 1 else 'pairs of words'} in all answers"
        figures[f"distinct_{length}"] = {"value": grams.share, "words": words, "baselines": []}
    return {
        "answers": len(answers.rows),
        "prompts": len(np.unique(answers.clusters)),
        "without_reference": int((~answers.referenced).sum()),
        "figures": figures,
        "worst": worst(answers),
    }


def worst(answers: ModelAnswers) -> list[JsonObject]:
    """Return the answers with the lowest F1 of words with their reference; without references, those that repeat
    themselves most."""
    name = "token_f1" if answers.worst else "repetition"
    return [
        {
            "row": one.row,
            "prompt": one.prompt,
            "answer": one.text,
            "references": list(one.references),
            name: value,
        }
        for value, one in answers.worst or answers.repetitive
    ]


def _against(
    words: str, baseline: AnswerTerms, name: str, terms: np.ndarray, clusters: Sequence[int]
) -> JsonObject:
    metric, other = baseline.metrics[name], baseline.terms(name)
    value = baseline.value(name)
    known: JsonObject = {"words": words, "value": value, "better": None}
    found = comparison.paired_interval(other, terms, clusters, metric.of_sums)
    if found is None:
        return known
    seen = metric.better != "neither" and not found.holds_zero
    better = (found.value > 0) == (metric.better == "higher") if seen else None
    return {**known, "difference": found.value, "low": found.low, "high": found.high, "better": better}


def _keep(
    kept: Sequence[tuple[float, Answered]], name: str, answers: Sequence[Answered], sign: int
) -> list[tuple[float, Answered]]:
    """Return the ``WORST`` of both by ``sign`` times the value of metric ``name``, the first rows of equal ones."""
    if not answers:
        return list(kept)
    values = answer_metrics.table()[name].terms(answers)[:, 0].tolist()
    return sorted([*kept, *zip(values, answers, strict=True)], key=lambda one: (sign * one[0], one[1].row))[
        :WORST
    ]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())
