"""report.html of a run folder: one self-contained page a person can read, keep and send.

It is made from what the run folder holds and nothing else, at any time: while the run goes on, after a kill, or years later. A
part that is missing is left out; a part that cannot be read is named on the page. Every text that came from outside is
escaped, and the page forbids itself scripts and requests (Content-Security-Policy), so a row of somebody's data cannot
act in the reader's browser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.engine import curves, report_parts
from tunesmith.engine.report_data import data_summary
from tunesmith.engine.report_parts import answers, facts, page, table, tile
from tunesmith.errors import DataError
from tunesmith.runs import figures, metrics_file, overfit


@dataclass(frozen=True)
class _Run:
    """What the run folder holds."""

    name: str
    recipe: str
    manifest: dict[str, Any]
    train: list[dict[str, Any]]  # the ``stop`` record of a run that was not finite too: its figures belong to the curves
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
        return value if figures.is_number(value) else None

    def points(self, records: list[dict[str, Any]], key: str) -> curves.Points:
        return [
            (one["step"], one[key]) for one in records if figures.is_number(one.get("step")) and figures.is_number(one.get(key))
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
        files.replace_file(folder / "loss.png", curves.png("loss", losses))
    report = folder / "report.html"
    files.replace_file(report, _page(run).encode())
    return report


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


def _page(run: _Run) -> str:
    sections = (_head, _tiles, _sets, _notes, _curves, _samples, _data, _settings, _foot)
    return page(run.name, [section(run) for section in sections])


def _head(run: _Run) -> str:
    model = run.manifest.get("model")
    title = model.get("name") or model.get("path") if isinstance(model, dict) else model
    tags = [_name(run.manifest.get(key)) for key in ("objective", "adaptation")]
    tags += [str(run.manifest["created"])] if run.manifest.get("created") else []
    command = run.manifest.get("command")
    command = " ".join(map(str, command)) if isinstance(command, list) else command
    return (
        f'<header><div class="eyebrow">tunesmith run · {escape(run.name)}</div><h1>{escape(str(title or run.name))}</h1>'
        + '<div class="tags">'
        + "".join(f"<span>{escape(tag)}</span>" for tag in tags if tag)
        + "</div>"
        + (f'<code class="command">$ {escape(figures.typed(str(command)))}</code>' if command else "")
        + "</header>"
    )


def _name(part: Any) -> str:
    """``lora``, or the type of ``{type: lora, r: 8}``."""
    return str(part.get("type", "")) if isinstance(part, dict) else str(part or "")


def _tiles(run: _Run) -> str:
    tiles = [
        *(_before_after(run, name, _titled(name)) for name in _measured(run)),
        _steps_tile(run),
        _speed_tile(run),
        _memory_tile(run),
        _trained_tile(run),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if any(tiles) else ""


def _measured(run: _Run) -> list[str]:
    """The names of the figures of an evaluation; of several sets those of all rows together."""
    return [name for name in figures.measured(run.evals, _set_names(run)) if run.points(run.evals, name)]


def _titled(name: str) -> str:
    """``eval_macro_f1`` -> Eval macro F1."""
    words = name.replace("_", " ").replace("f1", "F1").replace("auroc", "AUROC")
    return words[:1].upper() + words[1:]


def _before_after(run: _Run, key: str, name: str) -> str:
    """``2.114 -> 1.436``; from the evaluations so far where the run has no result yet."""
    points = run.points(run.evals, key)
    before = run.figure(f"{key}_before")
    if before is None and points and points[0][0] == 0:
        before = points[0][1]
    after = run.figure(key)
    if after is None and points and (before is None or len(points) > 1):
        after = points[-1][1]
    if after is None:
        return tile(name, figures.number(before), "before training") if before is not None else ""
    if before is None:
        return tile(name, figures.number(after))
    change = (after - before) / abs(before) if before and math.isfinite(before) and math.isfinite(after) else None
    sub = "" if change is None else f"{_change(change, figures.lower_is_better(key))} on held-out rows"
    return tile(name, f'<span class="from">{figures.number(before)} →</span> {figures.number(after)}', sub)


def _change(change: float, lower_is_better: bool | None) -> str:
    """``-7.2%`` of a loss in green, ``+1.0%`` in red; what rounds to nothing has neither sign nor colour."""
    text = f"{change:+.1%}"
    if lower_is_better is None:
        return f"<span>{text}</span>"
    if text in ("+0.0%", "-0.0%"):
        return "<span>0.0%</span>"
    return f'<span class="{"good" if (change < 0) is lower_is_better else "bad"}">{text}</span>'


def _sets(run: _Run) -> str:
    """One line for each evaluation set: before training, and at the step whose weights were kept (or as far as the run came)."""
    rows = []
    for name in _set_names(run):
        row: dict[str, Any] = {"set": name, "rows": run.part("data")["eval_sets"][name].get("rows")}
        for label in (one.removeprefix("eval_") for one in _measured(run)):
            points = dict(run.points(run.evals, f"eval_{name}_{label}"))
            if not points:
                continue
            kept = run.figure("best_step") if run.figure("best_step") in points else max(points, default=0)
            row |= {f"{label} before": points.get(0), f"{label} after": points.get(kept or 0)}
        rows.append(row)
    return f'<section><h2>Evaluation sets</h2><div class="card">{table(rows)}</div></section>' if rows else ""


def _set_names(run: _Run) -> list[str]:
    """The names of ``data.eval.sets``, in the order of the recipe."""
    splits = run.part("data").get("eval_sets")
    return [name for name, split in splits.items() if isinstance(split, dict)] if isinstance(splits, dict) else []


def _steps_tile(run: _Run) -> str:
    last = run.train[-1] if run.train else {}
    reached = [step for step, _ in run.points(run.train, "step")]
    steps = run.figure("steps")
    steps = reached[-1] if steps is None and reached else steps
    if steps is None:
        return ""
    parts = [f"{last['epoch']:.2f} epochs"] if figures.is_number(last.get("epoch")) else []
    seconds = run.figure("train_seconds")
    parts += [figures.duration(seconds)] if seconds is not None else []
    return tile("Steps", figures.number(steps), ", ".join(parts))


def _speed_tile(run: _Run) -> str:
    speed = run.figure("tokens_per_second")
    rates = [y for _, y in run.points(run.train, "tokens_per_second") if math.isfinite(y)]
    speed = sum(rates) / len(rates) if speed is None and rates else speed
    return tile("Speed", f"{figures.number(round(speed))} tokens/s", "padding not counted") if speed is not None else ""


def _memory_tile(run: _Run) -> str:
    peak = run.figure("peak_memory_bytes")
    held = [y for key in ("peak_memory_bytes", "memory_bytes") for _, y in run.points(run.train, key)]
    peak = max(held) if peak is None and held else peak
    if peak is None:
        return ""
    total = run.part("machine").get("memory_bytes")
    return tile("Peak memory", figures.size(peak), f"of {figures.size(total)}" if figures.is_number(total) else "")


def _trained_tile(run: _Run) -> str:
    counts = run.part("parameters")
    if not all(figures.is_number(counts.get(key)) for key in ("trainable", "total")):
        return ""
    trainable, total = counts["trainable"], counts["total"]
    return tile(
        "Trained", f"{figures.count(trainable)} parameters", f"{figures.share(trainable, total)} of {figures.count(total)}"
    )


def _notes(run: _Run) -> str:
    said = run.manifest.get("notes")
    notes = [*run.problems, *([str(note) for note in said] if isinstance(said, list) else [])]
    learnt_by_heart = overfit.overfit([*run.train, *run.evals])
    if learnt_by_heart is not None:
        notes.insert(0, f"Overfit: {learnt_by_heart.text}.")
    if run.part("result").get("stopped"):
        notes.insert(0, f"Stopped early: {run.part('result')['stopped']}")
    if not run.part("result") and run.manifest.get("stopped"):
        notes.insert(0, f"This run stopped. {run.manifest['stopped']}")
    elif not run.part("result"):
        at = f" Its last record is of step {run.train[-1].get('step')}." if run.train else ""
        notes.insert(0, f"This run had not finished when the report was written.{at} The figures are as far as it came.")
    return report_parts.notes(notes)


def _losses(run: _Run) -> list[curves.Curve]:
    found = [curves.Curve("train", run.points(run.train, "loss")), curves.Curve("eval", run.points(run.evals, "eval_loss"))]
    for number, name in enumerate(_set_names(run)):
        found.append(curves.Curve.of_set(f"eval {name}", run.points(run.evals, f"eval_{name}_loss"), number))
    return [curve for curve in found if curve.points]


CURVES = 4
"""Figures of an evaluation in one picture."""


def _own(run: _Run) -> list[str]:
    """What the objective itself says of each step, such as accuracy or rewards/margins: names of the records of training."""
    measured = _measured(run)
    names = dict.fromkeys(name for record in run.train for name in record if "/" in name or f"eval_{name}" in measured)
    return [name for name in names if name != "loss"]


def _curves(run: _Run) -> str:
    def of(key: str) -> list[curves.Curve]:
        return [curves.Curve("train", run.points(run.train, key))]

    loss = curves.chart("Loss", _losses(run))
    own = _own(run)
    better = [name for name in _measured(run) if not figures.lower_is_better(name) and name.removeprefix("eval_") not in own][
        :CURVES
    ]
    small = [
        *(curves.chart(_titled(name), [*of(name), curves.Curve("eval", run.points(run.evals, f"eval_{name}"))]) for name in own),
        curves.chart(
            "Held-out figures",
            [curves.Curve.of_set(name.removeprefix("eval_"), run.points(run.evals, name), n) for n, name in enumerate(better)],
            is_smoothed=False,
        ),
        curves.chart("Learning rate", of("learning_rate"), figures.rate, from_zero=True, is_smoothed=False),
        curves.chart(
            "Learning rate of the output layer", of("head_learning_rate"), figures.rate, from_zero=True, is_smoothed=False
        ),
        curves.chart("Loss scale", of("loss_scale"), figures.count, is_smoothed=False),
        curves.chart("Gradient norm", of("grad_norm"), from_zero=True),
        curves.chart("Update / weights, often about 1e-3", of("update_ratio"), figures.rate, is_log=True),
        curves.chart("Tokens per second", of("tokens_per_second"), figures.count, from_zero=True),
    ]
    if not loss and not any(small):
        return ""
    return f'<section><h2>Curves</h2><div class="wide">{loss}</div><div class="charts">{"".join(small)}</div></section>'


def _samples(run: _Run) -> str:
    """For each prompt the first and the last answer side by side; those between are folded away."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    cards = "".join(answers(prompt, given, run.figure("best_step")) for prompt, given in by_prompt.items())
    return f"<section><h2>Answers before and after</h2>{cards}</section>" if cards else ""


def _data(run: _Run) -> str:
    report = run.part("data")
    return f'<section><h2>Data</h2><div class="card panel">{data_summary(report)}</div></section>' if report else ""


def _settings(run: _Run) -> str:
    """The recipe beside the machine, and whatever else the manifest holds."""
    columns = []
    if run.recipe:
        columns.append(f'<h2>Recipe, every default filled in</h2><div class="card"><pre>{escape(run.recipe)}</pre></div>')
    rest = {key: value for key, value in run.manifest.items() if key not in ("data", "notes", "command", "created", "stopped")}
    machine = rest.pop("machine", None)
    if run.part("result"):
        rest["result"] = {
            key: value for key, value in run.part("result").items() if key not in ("samples", "verdict")
        }  # shown above
    column = f'<h2>Machine</h2><div class="card">{facts(machine)}</div>' if isinstance(machine, dict) else ""
    column += f'<h2>Manifest</h2><div class="card">{facts(rest)}</div>' if rest else ""
    columns += [column] if column else []
    return '<div class="pair">' + "".join(f"<section>{one}</section>" for one in columns) + "</div>" if columns else ""


def _foot(run: _Run) -> str:
    return f"<footer>Written by tunesmith {escape(str(run.manifest.get('tunesmith') or ''))}</footer>"
