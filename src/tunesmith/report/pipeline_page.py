"""report.html of a pipeline: every stage's figures, time and report, and the stages' answers side by side."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from tunesmith.json_types import JsonObject
from tunesmith.report import pages
from tunesmith.report.language import recorded, t
from tunesmith.report.pages import Tile, duration, heading
from tunesmith.runs import figure_format
from tunesmith.runs.figure_format import is_number, number, size


def write(folder: Path, facts: JsonObject) -> Path:
    """Write ``report.html`` of a pipeline from its summary ``facts``. Raises DiskFullError."""
    return pages.save(folder / "report.html", "pipeline.html", **page_values(facts))


def page_values(facts: JsonObject) -> JsonObject:
    """Return the values of ``pipeline.html``."""
    stages, comparison = facts["stages"], facts["comparison"] or {}
    done = [stage for stage in stages if stage["current"]]
    seconds = [stage["train_seconds"] for stage in done if is_number(stage["train_seconds"])]
    progress = t("{done} of {all}", done=len(done), all=len(stages))
    tiles = [Tile(t("Stages"), progress, t("trained"))]
    if seconds:
        tiles.append(Tile(t("Time"), duration(sum(seconds)), t("in optimiser steps")))
    return {
        "title": Path(facts["out"]).name,
        "version": facts["tunesmith"],
        "tags": [facts["pipeline"]],
        "tiles_shown": tiles,
        "stages": [_stage(stage) for stage in stages],
        "compared": [_known(row) for row in comparison.get("models", ())],
        "prompts": [_prompt(one) for one in comparison.get("prompts", ())],
    }


def _stage(stage: JsonObject) -> JsonObject:
    """Return one row of the table of stages, with its figures."""

    def cell(key: str, form: object = number) -> str:
        value = stage.get(key)
        return form(value) if is_number(value) and callable(form) else "-"

    return {
        "name": stage["stage"],
        "objective": stage["objective"],
        "adaptation": stage["adaptation"],
        "origin": figure_format.shorten_middle(stage["model"], 40),
        "steps": cell("steps"),
        "time": cell("train_seconds", duration),
        "memory": cell("peak_memory_bytes", size),
        "link": f"{quote(stage['stage'])}/report.html" if stage["current"] else "",
        "figures": [
            {"figure": heading(name), "before": before, "after": after}
            for name, (before, after) in (stage.get("figures") or {}).items()
        ],
        "verdict": [recorded(line) for line in stage.get("verdict") or []],
    }


def _known(row: JsonObject) -> JsonObject:
    return {key: value for key, value in row.items() if value is not None}


def _prompt(one: JsonObject) -> JsonObject:
    """Return a prompt with the labelled answers of all models; the reference is last."""
    prompt, reference = one["prompt"], one.get("reference")
    answers = []
    for model, text in one["answers"].items():
        scores = {judge: values.get(model) for judge, values in (one.get("rewards") or {}).items()}
        shown = [
            t("reward by {judge} {score}", judge=judge, score=number(score))
            for judge, score in scores.items()
            if is_number(score)
        ]
        answers.append({"kind": "", "label": ", ".join([model, *shown]), "text": text})
    if reference is not None:
        answers.append({"kind": "reference", "label": t("reference"), "text": _text(reference)})
    return {"text": _text(prompt), "answers": answers}


def _text(turns: object) -> str:
    """Return a text, or the turns of a conversation as lines."""
    if not isinstance(turns, list):
        return str(turns)
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
