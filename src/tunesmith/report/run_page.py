"""report.html of a run folder: one self-contained page to read, keep and send.

It is made of the files of the run folder alone, so it can be written at any time: during the run, after a
kill, or years later. A missing part is left out; a file that cannot be read is named on the page. The page
forbids scripts and requests (Content-Security-Policy) and every text is escaped (``pages``), so a row of the
user's data cannot run in the browser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tunesmith.errors import DataError
from tunesmith.files import replace_file
from tunesmith.json_types import JsonObject
from tunesmith.report import charts, pages, task_page
from tunesmith.report.answer_section import answer_rows, sample_prompts, worst_prompts
from tunesmith.report.curves import Curve, Plot, Points, plot
from tunesmith.report.data_section import data_values, grave_notes, mapping
from tunesmith.report.language import recorded, recorded_notes, sentence, t
from tunesmith.report.pages import Tile, change, duration, heading
from tunesmith.report.rollout_plots import rollout_plots
from tunesmith.runs import assessment, figure_format, metrics_file, overfit
from tunesmith.runs.figure_format import (
    count,
    is_number,
    lower_is_better,
    number,
    share,
    size,
)
from tunesmith.runs.run_list import type_of

MOST_CURVES = 4
"""Figures of an evaluation in one plot."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Run:
    """The files of a run folder."""

    name: str
    recipe: str
    manifest: JsonObject
    train: list[JsonObject]  # with the ``stop`` record of a non-finite loss: its figures belong to the curves
    evals: list[JsonObject]
    rollouts: list[JsonObject]
    samples: list[JsonObject]
    examples: JsonObject
    worst_answers: list[JsonObject]
    problems: list[str] = field(default_factory=list)  # files that could not be read

    def part(self, key: str) -> JsonObject:
        """Return a mapping of the manifest, {} if there is none."""
        return mapping(self.manifest.get(key))

    def figure(self, key: str) -> float | None:
        """Return a figure of the result, None if there is none."""
        value = self.part("result").get(key)
        return value if is_number(value) else None

    def assessed(self, key: str) -> JsonObject:
        """Return the assessment of a figure, {} if there is none."""
        figures = mapping(mapping(self.part("result").get("assessment")).get("figures"))
        return mapping(figures.get(key))

    def points(self, records: list[JsonObject], key: str) -> Points:
        pairs = ((one.get("step"), one.get(key)) for one in records)
        return [(step, value) for step, value in pairs if is_number(step) and is_number(value)]

    @property
    def sets(self) -> list[str]:
        """Names of ``data.eval.sets``, in the order of the recipe."""
        splits = mapping(self.part("data").get("eval_sets"))
        return [name for name, split in splits.items() if isinstance(split, dict)]

    @property
    def figure_names(self) -> list[str]:
        """Names of an evaluation's figures; with several sets, those of all sets together."""
        names = figure_format.figure_names(self.evals, self.sets)
        return [name for name in names if self.points(self.evals, name)]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and, once there is a loss, ``loss.png`` into the run folder; return the report's
    path.

    Reads recipe.yaml, manifest.json, metrics.jsonl and samples.jsonl; each may be missing or incomplete. Both
    files are replaced atomically. Raises DiskFullError.
    """
    folder = Path(run_dir)
    run = _read(folder)
    losses = _losses(run)
    if any(curve.finite for curve in losses):
        replace_file(folder / "loss.png", charts.png(charts.over_steps(t("loss"), losses)))
    return pages.save(folder / "report.html", "run.html", **page_values(run))


def is_current(run_dir: str | Path) -> bool:
    """Return whether report.html is at least as new as the manifest."""
    report, manifest = (Path(run_dir) / name for name in ("report.html", "manifest.json"))
    return report.exists() and report.stat().st_mtime_ns >= manifest.stat().st_mtime_ns


def _read(folder: Path) -> _Run:
    problems: list[str] = []

    def read(name: str, reader: Callable[[Path], _T], missing: _T) -> _T:
        path = folder / name
        if not path.exists():
            return missing
        try:
            return reader(path)
        except (OSError, ValueError, RecursionError, DataError) as error:
            problems.append(t("{name} cannot be read: {error}", name=name, error=error))
            return missing

    nothing: list[JsonObject] = []
    records = read("metrics.jsonl", metrics_file.read, nothing)
    kept = assessment.read(folder)
    return _Run(
        name=folder.resolve().name,
        recipe=read("recipe.yaml", lambda path: path.read_text(encoding="utf-8"), ""),
        manifest=read("manifest.json", lambda path: mapping(json.loads(path.read_bytes())), {}),
        train=[one for one in records if one.get("kind") in ("train", "stop")],
        evals=[one for one in records if one.get("kind") == "eval"],
        rollouts=[one for one in records if one.get("kind") == "rollout"],
        samples=read("samples.jsonl", metrics_file.read, nothing),
        examples=mapping(kept.get("examples")),
        worst_answers=mapping(kept.get("after")).get("worst_answers") or [],
        problems=problems,
    )


def page_values(run: _Run) -> JsonObject:
    """Return the values of ``run.html``."""
    manifest = run.manifest
    model, command, machine = (manifest.get(key) for key in ("model", "command", "machine"))
    title = model.get("name") or model.get("path") if isinstance(model, dict) else model
    tags = [type_of(manifest.get("objective")), type_of(manifest.get("adaptation")), manifest.get("created")]
    shown_above = ("data", "notes", "command", "created", "stopped", "machine")
    rest = {key: value for key, value in manifest.items() if key not in shown_above}
    if result := run.part("result"):
        rest["result"] = {
            key: value for key, value in result.items() if key not in ("samples", "verdict", "assessment")
        }
    return {
        "title": run.name,
        "version": manifest.get("tunesmith") or "",
        "heading": title or run.name,
        "tags": [tag for tag in tags if tag],
        "command": " ".join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "tiles_shown": _tiles(run),
        "sets": _sets(run),
        "notes_shown": _notes(run),
        "loss": plot(t("Loss"), _losses(run)),
        "small_plots": _small_plots(run),
        "prompts": sample_prompts(run.samples, run.figure("best_step")),
        "answer_rows": answer_rows(
            run.part("result"), mapping(mapping(run.part("result").get("assessment")).get("figures"))
        ),
        "worst_answers": worst_prompts(run.worst_answers),
        "examples": _examples(run),
        "data": data_values(run.part("data")) if run.part("data") else None,
        "recipe": run.recipe,
        "machine": machine if isinstance(machine, dict) else None,
        "manifest": rest,
    }


def _tiles(run: _Run) -> list[Tile]:
    """Return the headline figures. Until the run has a result they come from the records so far."""

    def values(key: str) -> list[float]:
        return [y for _, y in run.points(run.train, key)]

    def known(key: str, so_far: float | None) -> float | None:
        result = run.figure(key)
        return so_far if result is None else result

    figures = [name for name in run.figure_names if not name.startswith(assessment.ANSWERS)]
    tiles = [tile for name in figures if (tile := _before_after(run, name))]
    steps = known("steps", max(values("step"), default=None))
    if steps is not None:
        epoch, seconds = (run.train[-1] if run.train else {}).get("epoch"), run.figure("train_seconds")
        notes = [t("{epochs} epochs", epochs=f"{epoch:.2f}")] if is_number(epoch) else []
        notes += [duration(seconds)] if seconds is not None else []
        tiles.append(Tile(t("Steps"), number(steps), ", ".join(notes)))
    rates = [rate for rate in values("tokens_per_second") if math.isfinite(rate)]
    speed = known("tokens_per_second", sum(rates) / len(rates) if rates else None)
    if speed is not None:
        rate = t("{rate} tokens/s", rate=number(round(speed)))
        tiles.append(Tile(t("Speed"), rate, t("padding not counted")))
    so_far = max([*values("peak_memory_bytes"), *values("memory_bytes")], default=None)
    peak, memory = known("peak_memory_bytes", so_far), run.part("machine").get("memory_bytes")
    if peak is not None:
        of = t("of {memory}", memory=size(memory)) if is_number(memory) else ""
        tiles.append(Tile(t("Peak memory"), size(peak), of))
    trainable, total = (run.part("parameters").get(key) for key in ("trainable", "total"))
    if is_number(trainable) and is_number(total):
        note = t("{share} of {total}", share=share(trainable, total), total=count(total))
        tiles.append(Tile(t("Trained"), t("{count} parameters", count=count(trainable)), note))
    return tiles


def _before_after(run: _Run, key: str) -> Tile | None:
    """``2.114 -> 1.436``; from the evaluations so far if the run has no result yet."""
    name, points = heading(key), run.points(run.evals, key)
    before, after = run.figure(f"{key}_before"), run.figure(key)
    if before is None and points and points[0][0] == 0:
        before = points[0][1]
    if after is None and points and (before is None or len(points) > 1):
        after = points[-1][1]
    if after is None:
        return Tile(name, number(before), t("before training")) if before is not None else None
    if before is None:
        return Tile(name, number(after))
    assessed = run.assessed(key)
    known, baseline = assessed.get("change"), assessed.get("baseline")
    against = t("on held-out rows")
    if baseline:
        words = recorded(baseline["words"])
        against = t("baseline {value}: {words}", value=number(baseline["value"]), words=words)
    if known:
        trend = {True: "good", False: "bad", None: ""}[known["better"]]
        chance = t(", may be chance") if known["low"] <= 0 <= known["high"] else ""
        return Tile(name, number(after), against, number(before), f"{change(known)}{chance}", trend)
    if not (before and math.isfinite(before) and math.isfinite(after)):
        return Tile(name, number(after), against if baseline else "", number(before))
    text, trend = _change((after - before) / abs(before), lower_is_better(key))
    if run.part("result").get("assessment"):  # colours are for differences with an interval
        trend = ""
    return Tile(name, number(after), against, number(before), text, trend)


def _change(change: float, lower_is_better: bool | None) -> tuple[str, str]:
    """(``-7.2%``, ``good``) for a loss; a change that rounds to zero has neither sign nor colour."""
    text = f"{change:+.1%}"
    if lower_is_better is None:
        return text, ""
    if text in ("+0.0%", "-0.0%"):
        return "0.0%", ""
    return text, "good" if (change < 0) is lower_is_better else "bad"


def _sets(run: _Run) -> list[JsonObject]:
    """Return a row for each evaluation set: figures before training, and at the best or last step."""
    rows = []
    for name in run.sets:
        row: JsonObject = {"set": name, "rows": run.part("data")["eval_sets"][name].get("rows")}
        for label in (one.removeprefix("eval_") for one in run.figure_names):
            points = dict(run.points(run.evals, f"eval_{name}_{label}"))
            if points:
                best = run.figure("best_step")
                last = best if best is not None and best in points else max(points)
                shown = recorded(figure_format.label(label))
                row |= {
                    t("{figure} before", figure=shown): points.get(0),
                    t("{figure} after", figure=shown): points[last],
                }
        rows.append(row)
    return rows


def _examples(run: _Run) -> list[tuple[str, list[task_page.Mistake]]]:
    """Return sections of held-out rows with the model's answers: the worst mistakes, and some right ones."""
    titles = {"wrong": t("Worst mistakes on held-out rows"), "right": t("Some right answers")}
    return [
        (title, [task_page.mistake_card(one) for one in run.examples[name]])
        for name, title in titles.items()
        if run.examples.get(name)
    ]


def _notes(run: _Run) -> list[str]:
    """Return notes, the most important first.

    Their order: how the run ended, the verdict, faults of the data that make the figures or the model wrong,
    unreadable files, other notes."""
    kept, result = run.manifest.get("notes"), run.part("result")
    grave = grave_notes(run.part("data"))
    lines = list(map(str, kept)) if isinstance(kept, list) else []
    notes = [*grave, *run.problems, *recorded_notes(lines)]
    if verdict := overfit.detect([*run.train, *run.evals]):
        notes.insert(0, t("Overfit: {verdict}.", verdict=recorded(verdict.text)))
    verdict_lines = mapping(result.get("assessment")).get("verdict") or ()
    notes = [*map(sentence, verdict_lines), *notes]
    if result.get("stopped"):
        notes.insert(0, t("Stopped early: {reason}", reason=recorded(str(result["stopped"]))))
    if not result and run.manifest.get("stopped"):
        notes.insert(0, t("This run stopped. {reason}", reason=recorded(str(run.manifest["stopped"]))))
    elif not result:
        at = t(" Its last record is of step {step}.", step=run.train[-1].get("step")) if run.train else ""
        notes.insert(0, t("This run had not finished when the report was written.") + at)
    return notes


def _losses(run: _Run) -> list[Curve]:
    curves = [
        Curve(t("train"), run.points(run.train, "loss"), "train"),
        Curve(t("eval"), run.points(run.evals, "eval_loss"), "eval"),
    ]
    for index, name in enumerate(run.sets):
        curves.append(
            Curve.of_set(t("eval {name}", name=name), run.points(run.evals, f"eval_{name}_loss"), index)
        )
    return [curve for curve in curves if curve.points]


def _small_plots(run: _Run) -> list[Plot]:
    """Plot the objective's figures (accuracy, rewards/margins ...), held-out figures, and the training."""

    def train(key: str) -> Curve:
        return Curve(t("train"), run.points(run.train, key), "train")

    def held_out(key: str) -> Curve:
        return Curve(t("eval"), run.points(run.evals, f"eval_{key}"), "eval")

    names = run.figure_names
    logged = dict.fromkeys(name for record in run.train for name in record if name != "loss")
    own = [name for name in logged if "/" in name or f"eval_{name}" in names]
    labels = [name.removeprefix("eval_") for name in names if not lower_is_better(name)]
    labels = [label for label in labels if label not in own][:MOST_CURVES]
    only_held_out = [
        Curve.of_set(recorded(figure_format.label(label)), held_out(label).points, index)
        for index, label in enumerate(labels)
    ]
    rate = partial(plot, form=figure_format.rate, from_zero=True, is_smoothed=False)
    ratio = t("Update / weights, often about 1e-3")
    of_rollouts = rollout_plots(run.rollouts, run.train, run.evals, run.points)
    if of_rollouts:
        own, only_held_out = [], []  # they are among the figures of the rollouts
    plots = [
        *of_rollouts,
        *(plot(heading(name), [train(name), held_out(name)]) for name in own),
        plot(t("Held-out figures"), only_held_out, is_smoothed=False),
        rate(t("Learning rate"), [train("learning_rate")]),
        rate(t("Learning rate of the output layer"), [train("head_learning_rate")]),
        plot(t("Loss scale"), [train("loss_scale")], count, is_smoothed=False),
        plot(t("Gradient norm"), [train("grad_norm")], from_zero=True),
        plot(ratio, [train("update_ratio")], figure_format.rate, is_log=True),
        plot(t("Tokens per second"), [train("tokens_per_second")], count, from_zero=True),
    ]
    return [one for one in plots if one is not None]
