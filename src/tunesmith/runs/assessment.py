"""Assess a model in words: is it better than before training, better than a rule that needs no model, and is
the difference larger than chance? Computed once; the terminal, ``evaluate`` and the report show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tunesmith import files
from tunesmith.json_types import JsonObject
from tunesmith.metrics import intervals
from tunesmith.metrics.intervals import Interval, RowValues
from tunesmith.runs.figure_format import change_text, label, lower_is_better, number

FILE = "held_out.json"
"""In a run folder: the evaluations (``measured``) ``before`` training and ``after`` it, of the best model, whose
``answers`` the entry ``examples`` has with the text of their rows."""


def keep(run: Path, which: Literal["before", "after", "examples"], evaluation: JsonObject) -> None:
    """Write an evaluation into the run folder ``run``, atomically."""
    content = json.dumps({**read(run), which: evaluation}, ensure_ascii=False)
    files.replace_file(run / FILE, content.encode("utf-8", "replace"))


def read(run: Path) -> JsonObject:
    """Return the evaluations of a run folder by name; {} if it has none that can be read."""
    try:
        kept = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def measured(
    step: int | None,
    figures: dict[str, RowValues],
    baselines: dict[str, JsonObject],
    remarks: Sequence[str],
) -> JsonObject:
    """Return what an assessment needs of one evaluation, as JSON. ``figures``: values of each row.
    ``baselines``: ``words``, ``value`` and, where it has them, ``rows`` of each figure's baseline."""
    return {
        "step": step,
        "figures": {name: _listed(rows) for name, rows in figures.items() if _is_finite(rows)},
        "baselines": {
            name: {**one, "rows": _listed(one["rows"]) if one.get("rows") else None}
            for name, one in baselines.items()
        },
        "remarks": list(remarks),
    }


def _is_finite(rows: RowValues) -> bool:
    return all(math.isfinite(value) for values in rows.values() for value in values)


def _listed(rows: RowValues) -> list[list[float]]:
    return [[*place, *values] for place, values in sorted(rows.items())]


def _rows(listed: Sequence[Sequence[float]] | None) -> RowValues:
    return {(int(source), int(row)): (above, below) for source, row, above, below in listed or ()}


def assess(after: JsonObject, before: JsonObject | None, best: str) -> JsonObject:
    """Assess the evaluation ``after``, compared with ``before`` if there is one.

    ``best``: the figure that chooses the best model. Returns ``verdict``, a list of sentences, and ``figures``
    {name: {value, low, high, rows, change, baseline}}: ``change`` (None without ``before``) and the change
    from the ``baseline`` have value, low, high, rows and ``better``: True, False, or None where the interval
    holds zero, so that chance alone may explain it."""
    figures: JsonObject = {}
    old = before["figures"] if before else {}
    for name, listed in after["figures"].items():
        rows = _rows(listed)
        found = intervals.of_figure(rows)
        known = vars(found) if found else {"value": intervals.figure(rows), "rows": len(rows)}
        change = _difference(name, _rows(old.get(name)), rows)
        figures[name] = {**known, "change": change, "baseline": _baseline(after, name, rows)}
    for name, one in after["baselines"].items():  # figures without values of each row, such as macro F1
        figures.setdefault(name, {"baseline": {"words": one["words"], "value": one["value"]}})
    return {"verdict": [*_change_verdict(figures, best), *_baseline_verdict(figures, best), *after["remarks"]],
            "figures": figures}  # fmt: skip


def differences(run: Path, other: Path) -> JsonObject:
    """Return figure -> change (as in :func:`assess`) from the best model of a run to that of another, for the
    figures of both over the same held-out rows."""
    first, second = (read(folder).get("after", {}).get("figures", {}) for folder in (run, other))
    changes = {
        name: _difference(name, _rows(first[name]), _rows(second[name])) for name in first if name in second
    }
    return {
        name: change
        for name, change in changes.items()
        if change and change["rows"] == len(first[name]) == len(second[name])
    }


def _difference(name: str, before: RowValues, after: RowValues) -> JsonObject | None:
    found = intervals.of_difference(before, after)
    return None if found is None else {**vars(found), "better": _is_better(name, found)}


def _is_better(name: str, change: Interval) -> bool | None:
    lower = lower_is_better(name)
    return None if lower is None or change.holds_zero else (change.value < 0) is lower


def _baseline(after: JsonObject, name: str, rows: RowValues) -> JsonObject | None:
    one = after["baselines"].get(name)
    if one is None:
        return None
    change = _difference(name, _rows(one["rows"]), rows)
    return {"words": one["words"], "value": one["value"], "change": change}


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
    """A sentence where the model is not better than a rule: by the best figure, or the first with a baseline."""
    names = [name for name in (best, *figures) if (figures.get(name) or {}).get("baseline")]
    if not names:
        return []
    one = figures[names[0]]
    baseline = one["baseline"]
    change = baseline.get("change")
    if not change or change["better"]:
        return []
    rule = f"the baseline ({baseline['words']}: {number(baseline['value'])})"
    word = f"below {rule}" if change["better"] is False else f"not clearly better than {rule}"
    return [f"{word}: {label(names[0])} is {number(one['value'])}, {change_text(change)} away from it"]
