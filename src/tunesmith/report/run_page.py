"""report.html of a run folder: one self-contained page a person can read, keep and send.

It is made of the files of the run folder and nothing else, at any time: while the run goes on, after a kill, or years later. A
missing part is left out; a file that cannot be read is named on the page. The page forbids itself scripts and requests
(Content-Security-Policy), and every text is escaped (``pages``), so a row of somebody's data cannot act in the browser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.files import replace_file
from tunesmith.report import charts, curves, pages
from tunesmith.report.data_section import data_values
from tunesmith.report.pages import Tile, titled
from tunesmith.runs import figure_format, metrics_file, overfit

MOST_CURVES = 4
"""Figures of an evaluation in one plot."""


@dataclass(frozen=True)
class _Run:
    """The files of a run folder."""

    name: str
    recipe: str
    manifest: dict[str, Any]
    train: list[
        dict[str, Any]
    ]  # also the ``stop`` record of a run that became non-finite: its figures belong to the curves
    evals: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)  # files that could not be read

    def part(self, key: str) -> dict[str, Any]:
        """A mapping of the manifest; empty when it is not there."""
        value = self.manifest.get(key)
        return value if isinstance(value, dict) else {}

    def figure(self, key: str) -> float | None:
        """A figure of the result, when there is one."""
        value = self.part("result").get(key)
        return value if figure_format.is_number(value) else None

    def points(self, records: list[dict[str, Any]], key: str) -> curves.Points:
        numeric = (
            one
            for one in records
            if figure_format.is_number(one.get("step")) and figure_format.is_number(one.get(key))
        )
        return [(one["step"], one[key]) for one in numeric]

    @property
    def sets(self) -> list[str]:
        """The names of ``data.eval.sets``, in the order of the recipe."""
        splits = self.part("data").get("eval_sets")
        return (
            [name for name, split in splits.items() if isinstance(split, dict)]
            if isinstance(splits, dict)
            else []
        )

    @property
    def measured(self) -> list[str]:
        """The names of an evaluation's figures; of several sets those of all rows together."""
        return [
            name for name in figure_format.measured(self.evals, self.sets) if self.points(self.evals, name)
        ]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and, once there is a loss, ``loss.png`` into the run folder; return the report's path.

    Reads recipe.yaml, manifest.json, metrics.jsonl and samples.jsonl, each of which may be missing or cut short. Both files
    are replaced in one piece. Raises DiskFullError when there is no room for them.
    """
    folder = Path(run_dir)
    run = _read(folder)
    losses = _losses(run)
    if any(curve.finite for curve in losses):
        replace_file(folder / "loss.png", charts.png(charts.over_steps("loss", losses)))
    return pages.save(folder / "report.html", "run.html", **page_values(run))


def _read(folder: Path) -> _Run:
    problems: list[str] = []

    def attempt(name: str, reader: Callable[[Path], Any], missing: Any) -> Any:
        path = folder / name
        if not path.exists():
            return missing
        try:
            return reader(path)
        except (OSError, ValueError, DataError) as error:
            problems.append(f"{name} cannot be read: {error}")
            return missing

    manifest = attempt("manifest.json", lambda path: json.loads(path.read_text(encoding="utf-8")), {})
    records = attempt("metrics.jsonl", metrics_file.read, [])
    return _Run(
        name=folder.resolve().name,
        recipe=attempt("recipe.yaml", lambda path: path.read_text(encoding="utf-8"), ""),
        manifest=manifest if isinstance(manifest, dict) else {},
        train=[one for one in records if one.get("kind") in ("train", "stop")],
        evals=[one for one in records if one.get("kind") == "eval"],
        samples=attempt("samples.jsonl", metrics_file.read, []),
        problems=problems,
    )


def page_values(run: _Run) -> dict[str, Any]:
    """The values of ``run.html``."""
    model, command = run.manifest.get("model"), run.manifest.get("command")
    heading = model.get("name") or model.get("path") if isinstance(model, dict) else model
    tags = [
        _type(run.manifest.get("objective")),
        _type(run.manifest.get("adaptation")),
        run.manifest.get("created"),
    ]
    machine = run.manifest.get("machine")
    elsewhere = ("data", "notes", "command", "created", "stopped", "machine")
    rest = {key: value for key, value in run.manifest.items() if key not in elsewhere}
    if run.part("result"):  # samples and verdict have their places above
        rest["result"] = {
            key: value for key, value in run.part("result").items() if key not in ("samples", "verdict")
        }
    return {
        "title": run.name,
        "version": run.manifest.get("tunesmith") or "",
        "heading": heading or run.name,
        "tags": [tag for tag in tags if tag],
        "command": " ".join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "tiles_shown": _tiles(run),
        "sets": _sets(run),
        "notes_shown": _notes(run),
        "loss": curves.plot("Loss", _losses(run)),
        "small_plots": _small_plots(run),
        "prompts": _prompts(run),
        "data": data_values(run.part("data")) if run.part("data") else None,
        "recipe": run.recipe,
        "machine": machine if isinstance(machine, dict) else None,
        "manifest": rest,
    }


def _type(part: Any) -> str:
    """``lora``, or the type of ``{type: lora, r: 8}``."""
    return str(part.get("type", "")) if isinstance(part, dict) else str(part or "")


def _tiles(run: _Run) -> list[Tile]:
    last = run.train[-1] if run.train else {}
    steps = _known(
        run.figure("steps"), max((step for step, _ in run.points(run.train, "step")), default=None)
    )
    epochs = [f"{last['epoch']:.2f} epochs"] if figure_format.is_number(last.get("epoch")) else []
    seconds = run.figure("train_seconds")
    rates = [y for _, y in run.points(run.train, "tokens_per_second") if math.isfinite(y)]
    speed = _known(run.figure("tokens_per_second"), sum(rates) / len(rates) if rates else None)
    held = [y for key in ("peak_memory_bytes", "memory_bytes") for _, y in run.points(run.train, key)]
    peak = _known(run.figure("peak_memory_bytes"), max(held, default=None))
    memory = run.part("machine").get("memory_bytes")
    trainable, total = (run.part("parameters").get(key) for key in ("trainable", "total"))
    tiles = [tile for name in run.measured if (tile := _before_after(run, name))]
    if steps is not None:
        taken = [figure_format.duration(seconds)] if seconds is not None else []
        tiles.append(Tile("Steps", figure_format.number(steps), ", ".join([*epochs, *taken])))
    if speed is not None:
        tiles.append(Tile("Speed", f"{figure_format.number(round(speed))} tokens/s", "padding not counted"))
    if peak is not None:
        tiles.append(
            Tile(
                "Peak memory",
                figure_format.size(peak),
                f"of {figure_format.size(memory)}" if figure_format.is_number(memory) else "",
            )
        )
    if figure_format.is_number(trainable) and figure_format.is_number(total):
        share = f"{figure_format.share(trainable, total)} of {figure_format.count(total)}"
        tiles.append(Tile("Trained", f"{figure_format.count(trainable)} parameters", share))
    return tiles


def _known(result: float | None, so_far: float | None) -> float | None:
    """The figure of the result; while there is none, the one of the records so far."""
    return so_far if result is None else result


def _before_after(run: _Run, key: str) -> Tile | None:
    """``2.114 -> 1.436``; from the evaluations so far where the run has no result yet."""
    name, points = titled(key), run.points(run.evals, key)
    before, after = run.figure(f"{key}_before"), run.figure(key)
    if before is None and points and points[0][0] == 0:
        before = points[0][1]
    if after is None and points and (before is None or len(points) > 1):
        after = points[-1][1]
    if after is None:
        return Tile(name, figure_format.number(before), "before training") if before is not None else None
    if before is None:
        return Tile(name, figure_format.number(after))
    shown = {"name": name, "figure": figure_format.number(after), "before": figure_format.number(before)}
    if not (before and math.isfinite(before) and math.isfinite(after)):
        return Tile(**shown)
    change, trend = _change((after - before) / abs(before), figure_format.lower_is_better(key))
    return Tile(**shown, note="on held-out rows", change=change, trend=trend)


def _change(change: float, lower_is_better: bool | None) -> tuple[str, str]:
    """(``-7.2%``, ``good``) of a loss; a change that rounds to nothing has neither sign nor colour."""
    text = f"{change:+.1%}"
    if lower_is_better is None:
        return text, ""
    if text in ("+0.0%", "-0.0%"):
        return "0.0%", ""
    return text, "good" if (change < 0) is lower_is_better else "bad"


def _sets(run: _Run) -> list[dict[str, Any]]:
    """A row for each evaluation set: before training, and at the step whose weights were kept (or as far as the run came)."""
    rows = []
    for name in run.sets:
        row: dict[str, Any] = {"set": name, "rows": run.part("data")["eval_sets"][name].get("rows")}
        for label in (one.removeprefix("eval_") for one in run.measured):
            points = dict(run.points(run.evals, f"eval_{name}_{label}"))
            if not points:
                continue
            best = run.figure("best_step")
            row |= {
                f"{label} before": points.get(0),
                f"{label} after": points[best if best in points else max(points)],
            }
        rows.append(row)
    return rows


def _notes(run: _Run) -> list[str]:
    said, result = run.manifest.get("notes"), run.part("result")
    notes = [*run.problems, *(map(str, said) if isinstance(said, list) else ())]
    turned = overfit.overfit([*run.train, *run.evals])
    if turned is not None:
        notes.insert(0, f"Overfit: {turned.text}.")
    if result.get("stopped"):
        notes.insert(0, f"Stopped early: {result['stopped']}")
    if not result and run.manifest.get("stopped"):
        notes.insert(0, f"This run stopped. {run.manifest['stopped']}")
    elif not result:
        at = f" Its last record is of step {run.train[-1].get('step')}." if run.train else ""
        notes.insert(
            0,
            f"This run had not finished when the report was written.{at} The figures are as far as it came.",
        )
    return notes


def _losses(run: _Run) -> list[curves.Curve]:
    found = [
        curves.Curve("train", run.points(run.train, "loss")),
        curves.Curve("eval", run.points(run.evals, "eval_loss")),
    ]
    for number, name in enumerate(run.sets):
        found.append(curves.Curve.of_set(f"eval {name}", run.points(run.evals, f"eval_{name}_loss"), number))
    return [curve for curve in found if curve.points]


def _small_plots(run: _Run) -> list[curves.Plot]:
    """The objective's own figures (such as accuracy or rewards/margins), held-out figures, and how training went."""

    def train(key: str) -> list[curves.Curve]:
        return [curves.Curve("train", run.points(run.train, key))]

    measured = run.measured
    logged = dict.fromkeys(name for record in run.train for name in record if name != "loss")
    own = [name for name in logged if "/" in name or f"eval_{name}" in measured]
    held_out = [
        name
        for name in measured
        if not figure_format.lower_is_better(name) and name.removeprefix("eval_") not in own
    ]
    both = {name: [*train(name), curves.Curve("eval", run.points(run.evals, f"eval_{name}"))] for name in own}
    figures_held_out = [
        curves.Curve.of_set(name.removeprefix("eval_"), run.points(run.evals, name), number)
        for number, name in enumerate(held_out[:MOST_CURVES])
    ]
    rate = partial(curves.plot, form=figure_format.rate, from_zero=True, is_smoothed=False)
    plots = [
        *(curves.plot(titled(name), found) for name, found in both.items()),
        curves.plot("Held-out figures", figures_held_out, is_smoothed=False),
        rate("Learning rate", train("learning_rate")),
        rate("Learning rate of the output layer", train("head_learning_rate")),
        curves.plot("Loss scale", train("loss_scale"), figure_format.count, is_smoothed=False),
        curves.plot("Gradient norm", train("grad_norm"), from_zero=True),
        curves.plot(
            "Update / weights, often about 1e-3", train("update_ratio"), figure_format.rate, is_log=True
        ),
        curves.plot("Tokens per second", train("tokens_per_second"), figure_format.count, from_zero=True),
    ]
    return [plot for plot in plots if plot is not None]


@dataclass(frozen=True)
class Answer:
    """``kind``: before, after, reference, between or first."""

    kind: str
    label: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answers that are compared side by side, and those between, which are folded away."""

    text: str
    compared: list[Answer]
    between: list[Answer]


def _prompts(run: _Run) -> list[Prompt]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    return [_prompt(text, given, run.figure("best_step")) for text, given in by_prompt.items()]


def _prompt(text: str, given: Sequence[dict[str, Any]], best_step: float | None) -> Prompt:
    """Before training, after it (at the step whose weights were kept, when that is known), the reference."""
    first = given[0]
    last = next((one for one in reversed(given) if one.get("step") == best_step), given[-1])
    compared = [_answer("before" if first.get("step") == 0 else "first", first)]
    if last is not first:
        compared.append(_answer("after", last))
    reference = next((one["reference"] for one in given if one.get("reference")), None)
    if reference is not None:
        compared.append(Answer("reference", "reference, from the data", str(reference)))
    return Prompt(
        text, compared, [_answer("between", one) for one in given if one is not first and one is not last]
    )


def _answer(kind: str, sample: dict[str, Any]) -> Answer:
    step, text = sample.get("step"), sample.get("answer")
    at = [f"step {step:,}"] if figure_format.is_number(step) else []
    label = ", ".join([kind, *at]) if kind != "between" or not at else at[0]
    return Answer(kind, label, "" if text is None else str(text))
