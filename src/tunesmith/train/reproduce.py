"""A run repeated from what its folder says, and compared with it: records and weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith import recipe as recipes
from tunesmith.errors import DataError, UserError
from tunesmith.recipe import text as recipe_text
from tunesmith.runs import metrics_file, run_list
from tunesmith.runs.figure_format import is_number
from tunesmith.train import launch, run


def reproduce(path: str | Path, out: str | Path | None = None, console: Any = None) -> dict[str, Any]:
    """Train the run in ``path`` again into ``out`` (default: its folder's name with ``-again``) and compare.

    Returns equal, run, again, machine (what is not as it was), difference (of the first record that is not the same: step,
    figure, before, now; None when all are), furthest (the loss that differs most, likewise), weights_equal and records.

    Raises, before training, DataError when a data file changed since, with what changed, and UserError when the run never came to
    its end or lacks what the repetition would be compared with.
    """
    before = run_list.read(path)
    if before.state != "done":
        raise UserError(
            f"{before.path} is {before.state}: only a run that came to its end can be repeated and compared."
        )
    _require_results(before)
    chosen = recipes.parse(before.recipe, where=str(before.path / "recipe.yaml"))
    _require_same_data(before, run.check(chosen)["data"])
    target = Path(out) if out else before.path.with_name(f"{before.path.name}-again")
    _train_as(before, chosen, target, console)
    again = run_list.read(target)
    difference = first_difference(_lasting(before), _lasting(again))
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


def _train_as(before: run_list.StoredRun, chosen: recipes.Recipe, target: Path, console: Any) -> None:
    """With the run's own processes, DeepSpeed and micro-batches: other sums round otherwise."""
    processes, sharded = int(before.manifest.get("processes") or 1), before.manifest.get("deepspeed")
    if budget := before.manifest.get("micro_batch_tokens"):  # `auto` might find another now
        chosen = chosen.model_copy(
            update={"train": chosen.train.model_copy(update={"micro_batch_tokens": budget})}
        )
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        file = Path(folder) / "ds_config.json"
        file.write_text(json.dumps(sharded), encoding="utf-8")
        if processes == 1:
            run.train(chosen, out=target, deepspeed=file if sharded else None, console=console)
        else:
            given = ["--deepspeed", str(file)] if sharded else []
            path = Path(folder) / "recipe.yaml"
            path.write_text(recipe_text.dump(chosen.resolved()), encoding="utf-8")
            launch.launch(processes, ["train", str(path), "--out", str(target), *given], quiet=True)


def furthest(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where a loss, of training or of evaluation, is furthest from what it was: step, figure, before, now."""
    found = [
        {"step": one.get("step"), "figure": key, "before": one[key], "now": other[key]}
        for one, other in zip(before, now, strict=False)
        for key in ("loss", "eval_loss")
        if is_number(one.get(key)) and is_number(other.get(key))
    ]
    return max(found, key=lambda pair: abs(pair["before"] - pair["now"]), default=None)


def first_difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Step and figure of the first record that is not the same, with both values; None when none is."""
    for one, other in zip(before, now, strict=False):
        for key in dict.fromkeys([*one, *other]):
            # repr, because a figure that is not a number is not equal to itself
            if repr(one.get(key)) != repr(other.get(key)):
                return {"step": one.get("step"), "figure": key, "before": one.get(key), "now": other.get(key)}
    if len(before) != len(now):
        return {"step": None, "figure": "records", "before": len(before), "now": len(now)}
    return None


def _lasting(kept: run_list.StoredRun) -> list[dict[str, Any]]:
    """The records without what may differ between two runs of the same recipe."""
    return [
        {key: value for key, value in record.items() if key not in metrics_file.TIMING_KEYS}
        for record in kept.records
    ]


def _weights(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the model's weights."""
    return {file.name: files.sha256(file) for file in sorted((folder / "model").glob("*.safetensors"))}


def _require_results(before: run_list.StoredRun) -> None:
    """Raise UserError when the run has no records or no weights: the training would be in vain."""
    lacking = [] if before.records else [f"{before.path / 'metrics.jsonl'} has no records"]
    lacking += [] if _weights(before.path) else [f"{before.path / 'model'} has no weights (*.safetensors)"]
    if lacking:
        raise UserError(
            f"nothing to compare a repetition of {before.path} with: {' and '.join(lacking)}.\n"
            f"  Put it back; or train anew: tunesmith train {before.path / 'recipe.yaml'} --out DIR"
        )


def _require_same_data(before: run_list.StoredRun, now: dict[str, Any]) -> None:
    """Raise DataError naming each source whose content is not what the run was trained on."""
    recorded = {one["path"]: one for one in (before.manifest.get("data") or {}).get("sources", ())}
    changed = []
    for one in now["sources"]:
        old = recorded.get(one["path"])
        if old and old["sha256"] != one["sha256"]:
            was, is_ = (f"{side['sha256'][:12]} with {side['rows_read']:,} rows" for side in (old, one))
            changed.append(f"  {one['path']}: sha256 was {was}, is {is_}")
            if old.get("revision"):
                changed.append(f"  (type `tunesmith data pull` as before, with --commit {old['revision']})")
    if changed:
        raise DataError(
            f"the data of {before.path} changed since, so it cannot be repeated:\n"
            + "\n".join(changed)
            + "\n"
            "  Put the old files back; or train anew: tunesmith train "
            + str(before.path / "recipe.yaml")
            + " --out DIR"
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What of the machine and the libraries is not as it was: name -> [before, now]."""
    flat = [
        {**{k: v for k, v in one.items() if k != "versions"}, **(one.get("versions") or {})}
        for one in (before, now)
    ]
    return {
        key: [flat[0].get(key), flat[1].get(key)] for key in flat[1] if flat[0].get(key) != flat[1].get(key)
    }
