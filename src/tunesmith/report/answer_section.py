"""The table of a run's report with the figures of answers to held-out prompts (``data.eval.generate``)."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.json_types import JsonObject
from tunesmith.runs.assessment import ANSWERS
from tunesmith.runs.figure_format import interval_text, label, number, signed

_WORDS = {True: "better", False: "worse", None: "no difference seen"}


def answer_rows(result: Mapping[str, object], figures: Mapping[str, JsonObject]) -> list[JsonObject]:
    """Return a row of the table for each figure of answers in an assessment.

    ``result``: of the run, with the figures before training. ``figures``: as ``runs.assessment.assess`` returns
    them."""
    rows = []
    for name, one in figures.items():
        if not name.startswith(ANSWERS) or "value" not in one:
            continue
        before, change, baseline = result.get(f"{name}_before"), one.get("change"), one.get("baseline")
        row: JsonObject = {"figure": label(name.removeprefix(ANSWERS))}
        row["before"] = number(before) if isinstance(before, float) else "-"
        row |= {"after": number(one["value"]), "95% interval": interval_text(one)}
        row["change"] = (
            f"{signed(change['value'])} ({interval_text(change, signed)})"
            if change
            else interval_text({"rows": 0})
        )
        row[""] = _WORDS[change["better"]] if change else ""
        if baseline:
            known = baseline.get("change")
            row[baseline["words"]] = (
                f"{number(baseline['value'])}: {_WORDS[known['better'] if known else None]}"
            )
        rows.append(row)
    return rows
