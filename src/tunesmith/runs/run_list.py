"""Finished, running and broken runs, read from their folders: what became of each.

Only JSON and YAML are read; nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, RecipeError, UserError
from tunesmith.recipe import text as recipe_text
from tunesmith.runs import figure_format, metrics_file
from tunesmith.runs.figure_format import is_number

RESULTS = (
    "eval_loss_before",
    "eval_loss",
    "perplexity",
    "tokens_per_second",
    "peak_memory_bytes",
    "best_step",
    "tokens",
)
LOSSES = ("eval_loss", "perplexity")
"""Figures of an evaluation that have a place of their own."""


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
        result = self.manifest.get("result") or _so_far(self.records)
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
            "step": max(
                (record["step"] for record in self.records if is_number(record.get("step"))), default=0
            ),
            "checkpoint": _last_checkpoint(self.path),
            "planned_steps": self.manifest.get("steps"),
            **{name: result.get(name) for name in RESULTS},
            "figures": {
                name: [result.get(f"{name}_before"), result.get(name)]
                for name in result.get("figures", ())
                if name not in LOSSES
            },
            "verdict": result.get("verdict"),
            "stopped": self.manifest.get("stopped") or result.get("stopped"),
        }


def read(path: str | Path) -> Kept:
    """A run folder (or its model folder). Raises UserError when it is none, or naming the file and line that cannot be read."""
    folder = Path(path)
    if not (folder / "recipe.yaml").is_file() and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{path} is no run folder: it has no recipe.yaml.\n  `tunesmith runs list` shows the runs under ./runs."
        )
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
        raise UserError(
            f"there is no folder {folder}. `tunesmith train` makes ./runs; name another: tunesmith runs list DIR"
        )
    found = [_kept(path.parent) for path in (*folder.glob("recipe.yaml"), *folder.glob("*/recipe.yaml"))]
    return sorted(found, key=lambda run: (str(run.manifest.get("created")), run.path.name))


def _kept(folder: Path) -> Kept:
    """The run folder with what of it can be read, and the first thing that cannot."""
    recipe: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    try:
        recipe = _mapping(folder / "recipe.yaml")
        manifest = _mapping(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        records = metrics_file.read(folder / "metrics.jsonl")
    except DataError as error:
        return Kept(folder, recipe, manifest, [], str(error))
    except OSError as error:
        return Kept(folder, recipe, manifest, [], f"{error.filename}: {error.strerror}")
    return Kept(folder, recipe, manifest, records)


def _so_far(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run without a result: the evaluation before the first step, the best after it, the last speed."""
    evals = [one for one in records if one.get("kind") == "eval" and is_number(one.get("step"))]
    trained = [one for one in records if one.get("kind") == "train"]
    later = [one for one in evals if one["step"] > 0 and is_number(one.get("eval_loss"))]
    # The evaluation marked last is the one whose weights were kept; not every objective chooses by the loss.
    marked = [one for one in later if one.get("best") is True][-1:]
    best = marked[0] if marked else min(later, key=lambda one: one["eval_loss"], default={})
    last = trained[-1] if trained else {}
    first = next((one for one in evals if one["step"] == 0), {})
    sets = [
        name.removeprefix("eval_").removesuffix("_loss")
        for name in first
        if name.endswith("_loss") and name != "eval_loss"
    ]
    names = figure_format.measured([first, best], sets)
    peaks = [one["peak_memory_bytes"] for one in trained if is_number(one.get("peak_memory_bytes"))]
    return {
        "figures": names,
        **{f"{name}_before": first.get(name) for name in ("eval_loss", *names)},
        **{name: best.get(name) for name in (*LOSSES, *names)},
        "best_step": best.get("step"),
        **{name: last.get(name) for name in ("tokens_per_second", "tokens")},
        "peak_memory_bytes": max(peaks, default=None),
    }


def _last_checkpoint(folder: Path) -> int | None:
    """The step of the last checkpoint that was published, None where there is none."""
    found = [
        re.fullmatch(r"step-(\d+)", path.name)
        for path in (folder / "checkpoints").glob("step-*")
        if path.is_dir()
    ]
    return max((int(match.group(1)) for match in found if match), default=None)


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON or YAML file holds. Raises DataError naming file and line when that is no mapping."""
    advice = "\n  The file was changed by something else than tunesmith; restore it, or train anew into another folder."
    expected = f"expected one {'JSON object' if file.suffix == '.json' else 'YAML mapping'}"
    try:
        content = file.read_text(encoding="utf-8")
        value = json.loads(content) if file.suffix == ".json" else recipe_text.read(content, str(file))[0]
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: {expected}: {error.msg}{advice}") from None
    except (RecipeError, UnicodeDecodeError) as error:
        where = "" if isinstance(error, RecipeError) else f"{file}: {expected}: "
        raise DataError(f"{where}{error}{advice}") from None
    if not isinstance(value, dict):
        raise DataError(f"{file}, line 1: {expected}, got {str(value)[:60]!r}{advice}")
    return value


def _type(part: Any) -> str | None:
    """``lora`` of ``lora`` or ``{type: lora, r: 8}``."""
    return part.get("type") if isinstance(part, dict) else part


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
