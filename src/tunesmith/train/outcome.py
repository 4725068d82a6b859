"""What is written down of a run in its manifest, and what it came to."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from tunesmith import __version__
from tunesmith.models.load import quantization
from tunesmith.report import run_page
from tunesmith.runs import figure_format, metrics_file, overfit
from tunesmith.train import distributed, machine, plain_copy, setup
from tunesmith.train.loop import Job, Progression
from tunesmith.train.run_state import Run


def parameters_line(ready: setup.Setup) -> str:
    trainable, total = ready.outline.trainable, ready.outline.total
    return f"parameters: {trainable:,} trained of {total:,} ({100 * trainable / total:.2f}%)"


def precision_line(ready: setup.Setup) -> str:
    plan = ready.precision.as_dict()
    return f"precision: {plan['compute']} ({plan['why']}); trained weights {plan['trained_weights']}"


def notes(run: Run) -> list[str]:
    """What was said of the run and stands nowhere else in the manifest."""
    known = {*run.setup.data.report.lines(), parameters_line(run.setup), precision_line(run.setup)}
    return [note for note in run.progress.notes if note not in known]


def record_start(run: Run, micro_batch_tokens: int) -> None:
    ready = run.setup
    created = run.folder.manifest().get("created", datetime.now(UTC).isoformat(timespec="seconds"))
    run.folder.record(
        tunesmith=__version__,
        created=created,
        command=shlex.join(sys.argv),
        model={
            "name": ready.recipe.model,
            "path": str(ready.model_folder.path),
            "kind": ready.model_folder.kind,
        },
        objective=ready.recipe.resolved()["objective"],
        adaptation=ready.recipe.resolved()["adaptation"],
        parameters=ready.outline.counts(),
        data=ready.data.report.as_dict(),
        steps=ready.source.plan.steps,
        micro_batch_tokens=micro_batch_tokens,
        seed=ready.recipe.seed,
        precision=ready.precision.as_dict(),
        quantization=quantization.measured(run.model),
        deepspeed=ready.sharding.given if ready.sharding else None,
        route=run.route.as_dict(),
        machine=machine.describe(),
        processes=distributed.state().num_processes,
        notes=notes(run),
        stopped=None,  # of an earlier attempt
    )


def finish(run: Run, at: Progression, job: Job, before_model: int, stopped: str | None) -> dict[str, Any]:
    """The result, also kept in the manifest, and the report."""
    records = metrics_file.read(run.metrics.path)
    evaluations = [record for record in records if record["kind"] == "eval"]
    found = overfit.detect(records)
    first = next((record for record in evaluations if record["step"] == 0), {})
    best = next((record for record in evaluations if record["step"] == at.best_step), {})
    earlier = run.folder.manifest().get("result", {})
    if run.setup.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.setup.device)
    else:
        peak = machine.peak_memory_bytes() - before_model
    kept = quantization.measured(run.model)
    sets = run.setup.data.eval_sets
    measured = figure_format.figure_names([first, best], sets) or ["eval_loss", "perplexity"]
    result = {
        "figures": measured,
        **_before_and_kept(measured, first, best),
        **({"eval_sets": list(sets)} if sets else {}),
        **_before_and_kept(
            [name for one in sets for name in figure_format.figure_names([first, best], (), f"eval_{one}_")],
            first,
            best,
        ),
        "tokens_per_second": job.trained_tokens / job.seconds
        if job.seconds
        else earlier.get("tokens_per_second"),
        "train_seconds": job.seconds,
        **(
            {"reference_seconds": seconds}
            if (seconds := run.folder.manifest().get("reference_seconds"))
            else {}
        ),
        "peak_memory_bytes": peak,
        "trainable_parameters": run.setup.outline.trainable,
        "total_parameters": run.setup.outline.total,
        **({name: kept[name] for name in ("base_bytes", "base_bytes_before")} if kept else {}),
        "model_dir": str(run.folder.model),
        "run_dir": str(run.folder.path),
        "report": str(run.folder.path / "report.html"),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "stopped": stopped,
        "verdict": found.as_dict() if found else None,
        "samples": _before_and_after(run, at),
        "objective": run.setup.recipe.resolved()["objective"]["type"],
        "writes": run.setup.objective.traits.head == "lm",
    }
    if merged := plain_copy.copy(run):
        result["merged_dir"] = merged
    run.folder.record(
        result=result, notes=notes(run), finished=datetime.now(UTC).isoformat(timespec="seconds")
    )
    run_page.write_report(run.folder.path)
    return result


def _before_and_kept(
    names: Sequence[str], first: Mapping[str, Any], best: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures before training, and of the model that was kept."""
    return {
        key: value
        for name in names
        for key, value in ((f"{name}_before", first.get(name)), (name, best.get(name)))
    }


def _before_and_after(run: Run, at: Progression) -> list[dict[str, Any]]:
    answers = metrics_file.read(run.answers.path)
    after = {record["prompt"]: record["answer"] for record in answers if record["step"] == at.best_step}
    return [
        {
            "prompt": one["prompt"],
            "before": one["answer"],
            "after": after.get(one["prompt"]),
            "reference": one["reference"],
        }
        for one in answers
        if one["step"] == 0
    ]
