"""Assess a model: compare its figures with those before training and with a baseline, and write a verdict.

A difference counts only if its 95% interval excludes zero. Intervals are those of ``compare``: rows of one prompt
are a cluster (``metrics.comparison``). The assessment is computed once, and the terminal, ``evaluate`` and the
report show it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from tunesmith import files
from tunesmith.json_types import JsonObject
from tunesmith.metrics import comparison
from tunesmith.metrics.intervals import Clusters, Interval, Place, RowFigure, RowValues
from tunesmith.runs.figure_format import change_text, label, lower_is_better, number

ANSWERS = "eval_answer_"
"""Beginning of the names of figures of answers to held-out prompts (``data.eval.generate``)."""

FILE = "held_out.json"
"""File of a run folder with three entries.

``before`` and ``after``: the evaluations (``measured``) before training and of the best model. ``examples``:
the ``answers`` of ``after`` with the text of their rows."""


_DENSE = 6
"""Terms of a row up to this number are written without their indices."""


def keep(run: Path, which: Literal["before", "after", "examples"], evaluation: JsonObject) -> None:
    """Write the entry ``which`` into FILE of the run folder ``run``, atomically."""
    content = json.dumps({**read(run), which: evaluation}, ensure_ascii=False)
    files.replace_file(run / FILE, content.encode("utf-8", "replace"))


def read(run: Path) -> JsonObject:
    """Return the entries of a run folder's FILE; {} if the file is missing or unreadable."""
    try:
        kept = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def measured(
    step: int | None,
    figures: Mapping[str, RowFigure],
    baselines: Mapping[str, JsonObject],
    remarks: Sequence[str],
    groups: Mapping[Place, int],
) -> JsonObject:
    """Return the facts of one evaluation that ``assess`` needs, as JSON.

    ``figures``: each row's terms, by figure. ``baselines``: ``words``, ``value`` and ``rows`` (a RowFigure or
    None) of each figure's baseline. ``groups``: the key of each row's prompt (``data.rows.group_key``); rows that
    share one are kept as ``clusters``."""
    sizes = Counter(groups.values())
    numbers = {key: number for number, key in enumerate(key for key, size in sizes.items() if size > 1)}
    return {
        "step": step,
        "figures": {name: _as_json(one) for name, one in figures.items() if _is_finite(one.rows)},
        "baselines": {
            name: {**one, "rows": _as_json(one["rows"]) if one.get("rows") else None}
            for name, one in baselines.items()
        },
        "remarks": list(remarks),
        "clusters": [[*place, numbers[key]] for place, key in sorted(groups.items()) if key in numbers],
    }


def _is_finite(rows: RowValues) -> bool:
    return all(math.isfinite(value) for values in rows.values() for value in values)


def _as_json(figure: RowFigure) -> JsonObject:
    """Return the terms of each row, with their index where a row has many, most of which are 0."""
    width = len(next(iter(figure.rows.values()), ()))
    rows = [
        [*place, *(values if width <= _DENSE else chain(*((i, one) for i, one in enumerate(values) if one)))]
        for place, values in sorted(figure.rows.items())
    ]
    return {"function": figure.function, "width": width, "rows": rows}


def _row_figure(kept: JsonObject | None) -> RowFigure:
    if kept is None:
        return RowFigure({})
    width, rows = kept["width"], {}
    for source, row, *values in kept["rows"]:
        if width > _DENSE:
            terms = dict(zip(values[::2], values[1::2]))
            values = [terms.get(index, 0.0) for index in range(width)]
        rows[int(source), int(row)] = tuple(values)
    return RowFigure(rows, kept["function"])


def _clusters(kept: JsonObject) -> Clusters:
    return {(int(source), int(row)): number for source, row, number in kept.get("clusters") or ()}


def assess(after: JsonObject, before: JsonObject | None, best: str) -> JsonObject:
    """Assess the evaluation ``after``, compared with ``before`` if there is one.

    ``best``: the figure that chooses the best model. Returns ``verdict``, a list of sentences, and ``figures``
    {name: {value, low, high, rows, change, baseline}}. ``change`` (None without ``before``) is the difference
    from before training; ``baseline`` has ``words``, ``value`` and its own ``change``. Each change has value,
    low, high, rows and ``better``: True, False, or None if chance alone may explain it, because the interval
    includes zero."""
    figures: JsonObject = {}
    old, clusters = before["figures"] if before else {}, _clusters(after)
    for name, terms in after["figures"].items():
        figure = _row_figure(terms)
        found = comparison.of_figure(figure, clusters)
        known = vars(found) if found else {"value": figure.value, "rows": len(figure.rows)}
        change = _difference(name, _row_figure(old.get(name)), figure, clusters)
        baseline = _baseline(after, name, figure, clusters)
        figures[name] = {**known, "change": change, "baseline": baseline}
    for name, one in after["baselines"].items():  # figures without terms by row, such as AUROC
        figures.setdefault(name, {"baseline": {"words": one["words"], "value": one["value"]}})
    few = [] if before is None else _few_rows(after["figures"].get(best), clusters)
    return {"verdict": [*few, *_change_verdict(figures, best), *_baseline_verdict(figures, best), *after["remarks"]],
            "figures": figures}  # fmt: skip


def differences(run: Path, other: Path) -> JsonObject:
    """Return the change of each figure from the best model of ``run`` to that of ``other``.

    A change is as in :func:`assess`. Only figures over the same held-out rows in both runs have one."""
    kept = read(run).get("after", {})
    first, second = kept.get("figures", {}), read(other).get("after", {}).get("figures", {})
    clusters = _clusters(kept)
    changes = {
        name: _difference(name, _row_figure(first[name]), _row_figure(second[name]), clusters)
        for name in first
        if name in second
    }
    return {
        name: change
        for name, change in changes.items()
        if change and change["rows"] == len(first[name]["rows"]) == len(second[name]["rows"])
    }


def _difference(name: str, before: RowFigure, after: RowFigure, clusters: Clusters) -> JsonObject | None:
    found = comparison.of_difference(before, after, clusters)
    return None if found is None else {**vars(found), "better": _is_better(name, found)}


def _is_better(name: str, change: Interval) -> bool | None:
    lower = lower_is_better(name)
    return None if lower is None or change.holds_zero else (change.value < 0) is lower


def _baseline(after: JsonObject, name: str, figure: RowFigure, clusters: Clusters) -> JsonObject | None:
    one = after["baselines"].get(name)
    if one is None:
        return None
    change = _difference(name, _row_figure(one["rows"]), figure, clusters)
    return {"words": one["words"], "value": one["value"], "change": change}


def _few_rows(kept: JsonObject | None, clusters: Clusters) -> list[str]:
    """Return a sentence if the figure that decides has no interval because of its few rows or prompts."""
    places = list(_row_figure(kept).rows)
    prompts = len({clusters.get(place, place) for place in places})
    if not 0 < prompts < comparison.FEWEST:
        return []
    among = f" with {prompts:,} different prompts" if prompts < len(places) else ""
    needed = f"{comparison.FEWEST} different ones are needed"
    return [f"{len(places):,} held-out rows{among} are too few to say whether the model is better: {needed}"]


def _change_verdict(figures: JsonObject, best: str) -> list[str]:
    one = figures.get(best) or {}
    change = one.get("change")
    if not change:
        return []
    was, now = one["value"] - change["value"], one["value"]
    figure = (
        f"{label(best)} {number(was)} -> {number(now)}, a change of {change_text(change)} "
        f"over {change['rows']:,} held-out rows"
    )
    if change["better"] is None:
        return [f"no difference from before training can be told from chance: {figure}"]
    return [f"{'better' if change['better'] else 'worse'} than before training: {figure}"]


def _baseline_verdict(figures: JsonObject, best: str) -> list[str]:
    """Return a sentence if the model is not better than a baseline.

    It compares the figure ``best``, and the first with a baseline that is no loss."""
    names = [name for name in (best, *figures) if (figures.get(name) or {}).get("baseline")]
    chosen = [name for name in names if name == best][:1] + [name for name in names if name != "eval_loss"][
        :1
    ]
    for name in chosen:
        one = figures[name]
        baseline = one["baseline"]
        change = baseline.get("change")
        if not change or change["better"]:
            continue
        rule = f"the baseline ({baseline['words']}: {number(baseline['value'])})"
        word = f"worse than {rule}" if change["better"] is False else f"not clearly better than {rule}"
        return [f"{word}: {label(name)} is {number(one['value'])}, {change_text(change)} away from it"]
    return []
