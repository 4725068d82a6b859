"""Finished, running and broken runs, read from their folders: what became of each, and their curves over each other.

Only JSON and YAML are read; nothing here needs torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.engine import curves, tracking
from tunesmith.errors import DataError, UserError

RESULTS = (
    "eval_loss_before",
    "eval_loss",
    "perplexity",
    "tokens_per_second",
    "peak_memory_bytes",
    "steps",
    "best_step",
    "tokens",
)
COLOURS = ("#2f6db5", "#d2691e", "#0f8578", "#8a4fbf", "#a87900", "#c2185b", "#5b7d1c", "#6a6f78")


@dataclass(frozen=True)
class Kept:
    """A run folder as it stands: the resolved ``recipe``, the ``manifest``, the ``records`` of its metrics."""

    path: Path
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    problem: str | None = None
    """Which of its files cannot be read, where, and what to do; None when all can."""

    @property
    def state(self) -> str:
        """unreadable, running, done, stopped (it says why in its manifest) or killed (it does not)."""
        if self.problem:
            return "unreadable"
        if _is_held(self.path / ".lock"):
            return "running"
        if self.manifest.get("stopped"):
            return "stopped"
        return "done" if self.manifest.get("finished") else "killed"

    def facts(self) -> dict[str, Any]:
        """What a list of runs says of this one."""
        result = self.manifest.get("result") or {}
        return {
            "run": str(self.path),
            "state": self.state,
            "problem": self.problem,
            "objective": _type(self.recipe.get("objective")),
            "adaptation": _type(self.recipe.get("adaptation")),
            "model": self.recipe.get("model"),
            "created": self.manifest.get("created"),
            "processes": self.manifest.get("processes"),
            "sharded": bool(self.manifest.get("deepspeed")),
            "step": max((record.get("step", 0) for record in self.records), default=0),
            "planned_steps": self.manifest.get("steps"),
            **{name: result.get(name) for name in RESULTS if name != "steps"},
            "verdict": result.get("verdict"),
            "stopped": self.manifest.get("stopped") or result.get("stopped"),
        }


def read(path: str | Path) -> Kept:
    """A run folder (or its model folder). Raises UserError when it is none, or naming the file and line that cannot be read."""
    folder = Path(path)
    if not (folder / "recipe.yaml").is_file() and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder: it has no recipe.yaml.\n  `tunesmith runs list` shows the runs under ./runs.")
    kept = _kept(folder)
    if kept.problem:
        raise UserError(f"the run folder {folder} cannot be read: {kept.problem}")
    return kept


def find(folder: str | Path) -> list[Kept]:
    """All runs in and directly under ``folder``, the oldest first; those that cannot be read say so.

    Raises UserError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. `tunesmith train` makes ./runs; name another: tunesmith runs list DIR")
    found = [_kept(path.parent) for path in (*folder.glob("recipe.yaml"), *folder.glob("*/recipe.yaml"))]
    return sorted(found, key=lambda run: (str(run.manifest.get("created")), run.path.name))


def _kept(folder: Path) -> Kept:
    """The run folder with what of it can be read, and the first thing that cannot."""
    recipe: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    try:
        recipe = _mapping(folder / "recipe.yaml", yaml.safe_load)
        manifest = _mapping(folder / "manifest.json", json.loads) if (folder / "manifest.json").exists() else {}
        records = tracking.read(folder / "metrics.jsonl")
    except DataError as error:
        return Kept(folder, recipe, manifest, [], str(error))
    except OSError as error:
        return Kept(folder, recipe, manifest, [], f"{error.filename}: {error.strerror}")
    return Kept(folder, recipe, manifest, records)


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a JSON or YAML file holds. Raises DataError naming file and line when that is no mapping."""
    line, got = 1, ""
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        line, got = error.lineno, error.msg
    except yaml.MarkedYAMLError as error:
        line, got = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem or "no YAML"
    except (ValueError, yaml.YAMLError) as error:
        got = str(error)
    else:
        if isinstance(value, dict):
            return value
        got = f"got {str(value)[:60]!r}"
    raise DataError(
        f"{file}, line {line}: expected one {'JSON object' if file.suffix == '.json' else 'YAML mapping'}: {got}\n"
        f"  The file was changed by something else than tunesmith; restore it, or train anew into another folder."
    )


def _type(part: Any) -> str | None:
    """``lora`` of ``lora`` or ``{type: lora, r: 8}``."""
    return part.get("type") if isinstance(part, dict) else part


def differences(runs: Sequence[Kept]) -> dict[str, list[Any]]:
    """Dotted recipe key -> its value in each run, for the keys that are not the same in all."""
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    everything = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in everything.items() if len(set(map(repr, values))) > 1}


def cautions(runs: Sequence[Kept]) -> list[str]:
    """Why the held-out losses of these runs must not be compared, if they must not."""

    def unlike(values: list[Any]) -> bool:
        return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1

    data = [run.manifest.get("data") or {} for run in runs]
    held = []
    for run, part in zip(runs, data, strict=True):
        hashes = [one.get("sha256") for one in part.get("sources", ())]
        held.append((hashes, (part.get("eval") or {}).get("rows"), run.recipe.get("data", {}).get("eval")))
    checks = (
        ([(run.recipe.get("objective") or {}) for run in runs], "they have other objectives"),
        (held, "they were not evaluated on the same rows"),
        ([part.get("template") for part in data], "their rows were written by other templates"),
        ([run.recipe.get("model") for run in runs], "they start from other models (a loss per token depends on the tokenizer)"),
    )
    return [f"the losses are not comparable: {why}" for values, why in checks if unlike(values)]


def picture(runs: Sequence[Kept], by: str = "step") -> bytes:
    """PNG: training loss (smoothed) on the left, held-out loss on the right, one colour for each run; ``by``: step or tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = labels(runs)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, line = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
        learnt = _points(run, "train", "loss", by)
        if len(curves.smooth(learnt)) and len(learnt) >= 12:
            left.plot(*zip(*learnt, strict=True), color=colour, alpha=0.2, linewidth=0.8)
        for axes, points, mark in ((left, curves.smooth(learnt), ""), (right, _points(run, "eval", "eval_loss", by), "o")):
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, mark + line, color=colour, linewidth=1.8, markersize=5, label=name)
    for axes, title in ((left, "training loss"), (right, "held-out loss")):
        axes.set(xlabel=by, title=title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if not right.lines:
        right.text(0.5, 0.5, "no held-out rows", ha="center", va="center", transform=right.transAxes, color="#777777")
    figure.legend(
        *left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=1 if len(runs) > 4 else len(runs)
    )
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def labels(runs: Sequence[Kept]) -> list[str]:
    """Each run's folder name, with the few recipe keys that tell it from the others."""
    unlike = list(differences(runs).items())[:3]
    named = []
    for place, run in enumerate(runs):
        told = ", ".join(f"{key.rpartition('.')[2]} {values[place]}" for key, values in unlike)
        named.append(f"{run.path.name} ({told})" if told else run.path.name)
    return named


def _points(run: Kept, kind: str, figure: str, by: str) -> curves.Points:
    """(step or tokens, value) of every finite figure; an evaluation stands at the tokens of the training before it."""
    found, tokens = [], 0
    for record in run.records:
        tokens = record.get("tokens", tokens)
        if record["kind"] == kind and figure in record:
            found.append((float(record["step"] if by == "step" else tokens), float(record[figure])))
    return curves.Curve("", found).finite


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    flat: dict[str, Any] = {}
    for part, child in tree.items():
        flat |= _flat(child, f"{key}.{part}" if key else str(part))
    return flat


def _is_held(lock: Path) -> bool:
    """Whether a process holds the folder (where the system has such locks)."""
    if not lock.is_file():
        return False
    try:
        import fcntl
    except ImportError:
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
