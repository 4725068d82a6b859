"""Repeat a run from its folder, and compare records and weights with it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import files
from tunesmith import recipe as recipes
from tunesmith.errors import DataError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.recipe import text as recipe_text
from tunesmith.runs import metrics_file, run_list
from tunesmith.runs.figure_format import is_number
from tunesmith.train import launch, run, time_plan

if TYPE_CHECKING:
    from rich.console import Console


def reproduce(path: str | Path, out: str | Path | None = None, console: Console | None = None) -> JsonObject:
    """Train the run in ``path`` again into ``out`` (default: its folder's name with ``-again``) and compare.

    Returns equal, run, again, machine (what changed), difference (of the first record that differs: step,
    figure, before, now; None when all are equal), furthest (the loss that differs most, likewise),
    weights_equal and records.

    Before training it raises DataError when a data file changed, and UserError when the run is not finished
    or lacks what the repetition would be compared with.
    """
    before = run_list.read(path)
    if before.state != "done":
        raise UserError(
            f"{before.path} is {before.state}: expected a finished run. Finish it with --resume, or name another."
        )
    _require_results(before)
    recipe = recipes.parse(before.recipe, where=str(before.path / "recipe.yaml"))
    _require_same_data(before, run.check(recipe)["data"])
    target = Path(out) if out else before.path.with_name(f"{before.path.name}-again")
    _train_again(before, recipe, target, console)
    again = run_list.read(target)
    difference = first_difference(_comparable(before), _comparable(again))
    weights_equal = _weights(before.path) == _weights(target)
    return {
        "equal": difference is None and weights_equal,
        "run": str(before.path),
        "again": str(target),
        "machine": _changed(before.manifest.get("machine") or {}, again.manifest.get("machine") or {}),
        "difference": difference,
        "weights_equal": weights_equal,
        "records": len(before.records),
        "furthest": None if difference is None else furthest(before.records, again.records),
    }


def _train_again(
    before: run_list.StoredRun, recipe: recipes.Recipe, target: Path, console: Console | None
) -> None:
    """Train with the run's own processes, DeepSpeed and micro-batches: they decide how sums round."""
    processes, sharded = int(before.manifest.get("processes") or 1), before.manifest.get("deepspeed")
    train = time_plan.fixed(recipe.train, before.manifest)
    if budget := before.manifest.get("micro_batch_tokens"):  # `auto` might choose another now
        train = train.model_copy(update={"micro_batch_tokens": budget})
    recipe = recipe.model_copy(update={"train": train})
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        file = Path(folder) / "ds_config.json"
        file.write_text(json.dumps(sharded), encoding="utf-8")
        if processes == 1:
            run.train(recipe, out=target, deepspeed=file if sharded else None, console=console)
        else:
            options = ["--deepspeed", str(file)] if sharded else []
            path = Path(folder) / "recipe.yaml"
            path.write_text(recipe_text.dump(recipe.resolved()), encoding="utf-8")
            launch.launch(processes, ["train", str(path), "--out", str(target), *options], quiet=True)


def furthest(before: list[JsonObject], now: list[JsonObject]) -> JsonObject | None:
    """Return where a loss, of training or of evaluation, differs most: step, figure, before, now."""
    pairs = [
        {"step": old.get("step"), "figure": key, "before": old[key], "now": new[key]}
        for old, new in zip(before, now, strict=False)
        for key in ("loss", "eval_loss")
        if is_number(old.get(key)) and is_number(new.get(key))
    ]
    return max(pairs, key=lambda pair: abs(pair["before"] - pair["now"]), default=None)


def first_difference(before: list[JsonObject], now: list[JsonObject]) -> JsonObject | None:
    """Return step, figure, before and now of the first difference; None when the records are equal."""
    for old, new in zip(before, now, strict=False):
        for key in dict.fromkeys([*old, *new]):
            if repr(old.get(key)) != repr(new.get(key)):  # repr, because NaN does not equal itself
                return {"step": old.get("step"), "figure": key, "before": old.get(key), "now": new.get(key)}
    if len(before) != len(now):
        return {"step": None, "figure": "records", "before": len(before), "now": len(now)}
    return None


def _comparable(kept: run_list.StoredRun) -> list[JsonObject]:
    """Return the records without the keys that may differ between two runs of the same recipe."""
    ignored = metrics_file.TIMING_KEYS
    return [{key: value for key, value in record.items() if key not in ignored} for record in kept.records]


def _weights(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 of the model's weights."""
    return {file.name: files.sha256(file) for file in sorted((folder / "model").glob("*.safetensors"))}


def _require_results(before: run_list.StoredRun) -> None:
    """Raise UserError when the run has no records or no weights, before time is spent on training."""
    missing = [] if before.records else [f"{before.path / 'metrics.jsonl'} has no records"]
    missing += [] if _weights(before.path) else [f"{before.path / 'model'} has no weights (*.safetensors)"]
    if missing:
        raise UserError(
            f"nothing to compare a repetition of {before.path} with: {' and '.join(missing)}.\n"
            f"  Restore it, or train again: tunesmith train {before.path / 'recipe.yaml'} --out DIR"
        )


def _require_same_data(before: run_list.StoredRun, now: JsonObject) -> None:
    """Raise DataError naming each source whose content differs from what the run was trained on."""
    recorded = {source["path"]: source for source in (before.manifest.get("data") or {}).get("sources", ())}
    changed = []
    for source in now["sources"]:
        old = recorded.get(source["path"])
        if old and old["sha256"] != source["sha256"]:
            was, is_ = (f"{side['sha256'][:12]} with {side['rows_read']:,} rows" for side in (old, source))
            changed.append(f"  {source['path']}: sha256 was {was}, is {is_}\n")
            if old.get("revision"):
                changed.append(f"  (type `tunesmith data pull` again with --commit {old['revision']})\n")
    if not changed and _held_out(before.manifest.get("data")) != _held_out(now):
        raise DataError(
            f"this tunesmith holds out other rows (data.eval.fraction) than the version that trained {before.path}, so the "
            f"run cannot be repeated.\n  Repeat it with that version, or train again: tunesmith train "
            f"{before.path / 'recipe.yaml'} --out DIR"
        )
    if changed:
        raise DataError(
            f"the data of {before.path} changed since the run, so it cannot be repeated:\n{''.join(changed)}"
            f"  Restore the old files, or train again: tunesmith train {before.path / 'recipe.yaml'} --out DIR"
        )


def _held_out(data: JsonObject | None) -> str | None:
    """Return the hash of the rows that were held out of the training set."""
    digest: str | None = ((data or {}).get("held_out") or {}).get("digest")
    return digest


def _changed(before: JsonObject, now: JsonObject) -> JsonObject:
    """Return what changed of the machine and the libraries: name -> [before, now]."""
    old, new = (
        {**{key: value for key, value in side.items() if key != "versions"}, **(side.get("versions") or {})}
        for side in (before, now)
    )
    return {key: [old.get(key), new.get(key)] for key in new if old.get(key) != new.get(key)}
