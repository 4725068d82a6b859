"""Runs read back from their folders: finished, running and broken ones.

Only JSON and YAML are read; no torch is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import DataError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.runs import figure_format, metrics_file
from tunesmith.runs.figure_format import is_number
from tunesmith.runs.run_folder import read_mapping

RESULTS = (
    "eval_loss_before", "eval_loss", "perplexity", "tokens_per_second", "peak_memory_bytes", "best_step", "tokens",
)  # fmt: skip
LOSSES = ("eval_loss", "perplexity")
"""Evaluation figures that ``facts`` lists under their own keys, not under ``figures``."""


@dataclass(frozen=True)
class StoredRun:
    """A run folder: the resolved ``recipe``, the ``manifest``, and the ``records`` of its metrics."""

    path: Path
    recipe: JsonObject
    manifest: JsonObject
    records: list[JsonObject]
    problem: str | None = None
    """The file that cannot be read, the place in it, and what to do; None if all can be read."""

    @property
    def state(self) -> str:
        """unreadable, running, done, stopped (the manifest has a reason) or killed (it has none)."""
        if self.problem:
            return "unreadable"
        if _is_locked(self.path / ".lock"):
            return "running"
        if self.manifest.get("stopped"):
            return "stopped"
        return "done" if self.manifest.get("finished") else "killed"

    def facts(self) -> JsonObject:
        """Return what ``runs list --json`` shows of this run."""
        result = self.manifest.get("result") or _result_so_far(self.records)
        names = [name for name in result.get("figures", ()) if name not in LOSSES]
        steps = [record["step"] for record in self.records if is_number(record.get("step"))]
        return {
            "run": str(self.path),
            "state": self.state,
            "problem": self.problem,
            "objective": type_of(self.recipe.get("objective")),
            "adaptation": type_of(self.recipe.get("adaptation")),
            "model": self.recipe.get("model"),
            "created": self.manifest.get("created"),
            "processes": self.manifest.get("processes"),
            "sharded": bool(self.manifest.get("deepspeed")),
            "step": max(steps, default=0),
            "checkpoint": _last_checkpoint(self.path),
            "planned_steps": self.manifest.get("steps"),
            **{name: result.get(name) for name in RESULTS},
            "figures": {name: [result.get(f"{name}_before"), result.get(name)] for name in names},
            "verdict": result.get("verdict"),
            "stopped": self.manifest.get("stopped") or result.get("stopped"),
        }


def read(path: str | Path) -> StoredRun:
    """Read a run folder, or the run folder of a model folder.

    Raises UserError if it is not one, or naming the file and line that cannot be read.
    """
    folder = Path(path)
    if not (folder / "recipe.yaml").is_file() and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{path} is not a run folder: it has no recipe.yaml.\n  `tunesmith runs list` lists the runs in ./runs."
        )
    run = _read_files(folder)
    if run.problem:
        raise UserError(f"the run folder {folder} cannot be read: {run.problem}")
    return run


def find(folder: str | Path) -> list[StoredRun]:
    """Return all runs in and directly under ``folder``, oldest first; unreadable ones have a ``problem``.

    Raises UserError if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}. `tunesmith train` makes ./runs. To list another: tunesmith runs list DIR"
        )
    runs = [_read_files(path.parent) for path in (*folder.glob("recipe.yaml"), *folder.glob("*/recipe.yaml"))]
    return sorted(runs, key=lambda run: (str(run.manifest.get("created")), run.path.name))


def type_of(part: object) -> str | None:
    """Return ``lora`` for ``lora`` and for ``{type: lora, r: 8}``."""
    value = part.get("type") if isinstance(part, dict) else part
    return None if value is None else str(value)


def _read_files(folder: Path) -> StoredRun:
    """Read the files of a run folder up to the first that cannot be read."""
    recipe: JsonObject = {}
    manifest: JsonObject = {}
    try:
        recipe = read_mapping(folder / "recipe.yaml")
        manifest = read_mapping(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        records = metrics_file.read(folder / "metrics.jsonl")
    except DataError as error:
        return StoredRun(folder, recipe, manifest, [], str(error))
    except OSError as error:
        return StoredRun(folder, recipe, manifest, [], f"{error.filename}: {error.strerror}")
    return StoredRun(folder, recipe, manifest, records)


def _result_so_far(records: list[JsonObject]) -> JsonObject:
    """Return the figures of an unfinished run: before the first step, the best since, the last speed."""
    evals = [one for one in records if one.get("kind") == "eval" and is_number(one.get("step"))]
    trained = [one for one in records if one.get("kind") == "train"]
    last = trained[-1] if trained else {}
    first, best = next((one for one in evals if one["step"] == 0), {}), _best_evaluation(evals)
    losses = [name for name in first if name.endswith("_loss") and name != "eval_loss"]
    sets = [name.removeprefix("eval_").removesuffix("_loss") for name in losses]
    names = figure_format.figure_names([first, best], sets)
    peaks = [one["peak_memory_bytes"] for one in trained if is_number(one.get("peak_memory_bytes"))]
    return {
        "figures": names,
        **{f"{name}_before": first.get(name) for name in ("eval_loss", *names)},
        **{name: best.get(name) for name in (*LOSSES, *names)},
        "best_step": best.get("step"),
        **{name: last.get(name) for name in ("tokens_per_second", "tokens")},
        "peak_memory_bytes": max(peaks, default=None),
    }


def _best_evaluation(evals: list[JsonObject]) -> JsonObject:
    """Return the evaluation of the kept weights: the last one marked "best", else that of the lowest loss."""
    later = [one for one in evals if one["step"] > 0 and is_number(one.get("eval_loss"))]
    marked = [one for one in later if one.get("best") is True]
    return marked[-1] if marked else min(later, key=lambda one: one["eval_loss"], default={})


def _last_checkpoint(folder: Path) -> int | None:
    """Return the step of the last published checkpoint."""
    folders = (path for path in (folder / "checkpoints").glob("*") if path.is_dir())
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folders)
    return max((int(match.group(1)) for match in matches if match), default=None)


def _is_locked(lock: Path) -> bool:
    """Return whether a process holds the lock; False where the system has no flock."""
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
