"""Assess the figures of answers to held-out prompts (``data.eval.generate``) with the intervals of ``compare``.

An evaluation keeps ``answers_to_prompts``: the terms of each figure by row, those of a baseline, and ``clusters``, a number
for each row; rows with the same prompt have the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.metrics import answer_metrics, comparison
from tunesmith.metrics.intervals import Place
from tunesmith.metrics.sum_functions import OfSums, ratio
from tunesmith.runs.figure_format import lower_is_better

PREFIX = "eval_answer_"
"""Beginning of the names of these figures."""

Terms: TypeAlias = Mapping[Place, Sequence[float]]


def listed(rows: Terms) -> list[list[float]]:
    """Return the terms of each row as JSON: source, row, terms."""
    return [[*place, *terms] for place, terms in sorted(rows.items())]


def assess(after: JsonObject, before: JsonObject | None) -> JsonObject:
    """Return {figure: value, low, high, rows, change, baseline}, as ``runs.assessment.assess`` does.

    ``after`` and ``before``: ``answers_to_prompts`` of two evaluations."""
    clusters = _rows(after["clusters"])
    figures: JsonObject = {}
    for name, kept in after["figures"].items():
        rows = _rows(kept)
        of_sums, bounds = _function_of(name)
        terms = np.array(list(rows.values()), np.float64)
        found = comparison.interval(terms, [clusters[place][0] for place in rows], of_sums)
        known: JsonObject = {"value": float(of_sums(terms.sum(axis=0)[None])[0]), "rows": len(rows)}
        if found is not None:
            known |= {"low": max(bounds[0], found.low), "high": min(bounds[1], found.high)}
        old = _rows((before or {}).get("figures", {}).get(name))
        known["change"] = _difference(name, old, rows, clusters)
        one = after["baselines"].get(name)
        known["baseline"] = one and {
            "words": one["words"], "value": one["value"], "change": _difference(name, _rows(one["rows"]), rows, clusters),
        }  # fmt: skip
        figures[name] = known
    return figures


def _rows(kept: Sequence[Sequence[float]] | None) -> dict[Place, tuple[float, ...]]:
    return {(int(source), int(row)): tuple(terms) for source, row, *terms in kept or ()}


def _difference(name: str, before: Terms, after: Terms, clusters: Terms) -> JsonObject | None:
    places = sorted(before.keys() & after.keys())
    if not places:
        return None
    first, second = (np.array([rows[place] for place in places], np.float64) for rows in (before, after))
    of_row = [clusters[place][0] for place in places]
    found = comparison.paired_interval(first, second, of_row, _function_of(name)[0])
    if found is None:
        return None
    lower = lower_is_better(name)
    better = None if lower is None or found.holds_zero else (found.value < 0) is lower
    return {**vars(found), "better": better}


def _function_of(name: str) -> tuple[OfSums, tuple[float, float]]:
    """Return how sums of terms become the figure, and its bounds; a function of the user is a mean."""
    metric = answer_metrics.table().get(name.removeprefix(PREFIX))
    return (ratio, (-math.inf, math.inf)) if metric is None else (metric.of_sums, metric.bounds)
