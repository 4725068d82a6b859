"""The manifest of a run and its result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from tunesmith import __version__, machine
from tunesmith.data.read.source import eval_sources
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.models.load import quantization
from tunesmith.report import run_page
from tunesmith.runs import assessment, metrics_file, overfit
from tunesmith.runs.figure_format import figure_names
from tunesmith.train import distributed, evaluation, examples, plain_copy, setup
from tunesmith.train.held_out_answers import AnswerEvaluation
from tunesmith.train.loop import Job
from tunesmith.train.progression import Progression
from tunesmith.train.run_state import Run

EXAMPLES = 20
"""Most wrong answers in the report of a run. Equal mistakes count as one."""


def parameters_line(ready: setup.Setup) -> str:
    trainable, total = ready.outline.trainable, ready.outline.total
    return f"parameters: {trainable:,} trained of {total:,} ({100 * trainable / total:.2f}%)"


def precision_line(ready: setup.Setup) -> str:
    plan = ready.precision.as_dict()
    return f"precision: {plan['compute']} ({plan['why']}); trained weights {plan['trained_weights']}"


def notes(run: Run) -> list[str]:
    """Return the notes of the run that the manifest holds under no other key."""
    known = {*run.setup.data.report.lines(), parameters_line(run.setup), precision_line(run.setup)}
    return [note for note in run.progress.notes if note not in known]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_start(run: Run, micro_batch_tokens: int) -> None:
    """Write what is known before the first step into the manifest."""
    ready, recipe = run.setup, run.setup.recipe.resolved()
    folder = ready.model_folder
    run.folder.record(
        tunesmith=__version__,
        created=run.folder.manifest().get("created", _now()),
        command=shlex.join(sys.argv),
        model={"name": ready.recipe.model, "path": str(folder.path), "kind": folder.kind},
        objective=recipe["objective"],
        adaptation=recipe["adaptation"],
        parameters=ready.outline.counts(),
        data=ready.data.report.as_dict(),
        steps=ready.source.plan.steps,
        micro_batch_tokens=micro_batch_tokens,
        seed=ready.recipe.seed,
        precision=ready.precision.as_dict(),
        quantization=quantization.measure(run.model),
        deepspeed=ready.sharding.given if ready.sharding else None,
        route=run.fast_path.as_dict(),
        machine=machine.describe(),
        processes=distributed.state().num_processes,
        notes=notes(run),
        stopped=None,  # clears that of an earlier attempt
    )


def finish(
    run: Run, position: Progression, job: Job, memory_before_model: int, stopped: str | None
) -> JsonObject:
    """Write the result into the manifest, write the report, and return the result."""
    records = metrics_file.read(run.metrics.path)
    evaluations = {record["step"]: record for record in reversed(records) if record["kind"] == "eval"}
    verdict = overfit.detect(records)
    first, best = evaluations.get(0, {}), evaluations.get(position.best_step, {})
    manifest, outline = run.folder.manifest(), run.setup.outline
    if run.setup.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.setup.device)
    else:
        peak = machine.peak_memory_bytes() - memory_before_model
    quantized = quantization.measure(run.model)
    sets = run.setup.data.eval_sets
    figures = figure_names([first, best], sets) or ["eval_loss", "perplexity"]
    set_figures = [name for one in sets for name in figure_names([first, best], (), f"eval_{one}_")]
    speed = manifest.get("result", {}).get(
        "tokens_per_second"
    )  # of an earlier attempt that took the last step
    if job.seconds:
        speed = job.trained_tokens / job.seconds
    result = {
        "figures": figures,
        **_before_and_after(figures, first, best),
        **({"eval_sets": list(sets)} if sets else {}),
        **_before_and_after(set_figures, first, best),
        "tokens_per_second": speed,
        "train_seconds": job.seconds,
        **{key: manifest[key] for key in ("reference_seconds",) if manifest.get(key)},
        "peak_memory_bytes": peak,
        "trainable_parameters": outline.trainable,
        "total_parameters": outline.total,
        **({name: quantized[name] for name in ("base_bytes", "base_bytes_before")} if quantized else {}),
        "model_dir": str(run.folder.model),
        "run_dir": str(run.folder.path),
        "report": str(run.folder.path / "report.html"),
        "steps": position.step,
        "best_step": position.best_step,
        "tokens": position.tokens,
        "stopped": stopped,
        "verdict": verdict.as_dict() if verdict else None,
        "assessment": _assessment(run, position),
        "samples": _samples(run, position),
        "objective": run.setup.recipe.resolved()["objective"]["type"],
        "writes": run.setup.objective.traits.head == "lm",
    }
    if merged := plain_copy.copy(run):
        result["merged_dir"] = merged
    run.folder.record(result=result, notes=notes(run), finished=_now())
    _keep_examples(run)
    run_page.write_report(run.folder.path)
    return result


def keep_evaluation(
    run: Run, step: int, best: bool, records: Sequence[JsonObject], answers: AnswerEvaluation | None
) -> None:
    """Save each row's terms of the figures in the run folder, if the evaluation is the first or the best."""
    if best or step == 0:
        objective = run.setup.objective
        assert run.setup.data.eval is not None
        kept = evaluation.measured(objective, records, run.setup.data.eval, step, answers)
        if answers is not None:
            kept["worst_answers"] = answers.worst
        if best:
            kept["answers"] = examples.select(objective.answers(records), EXAMPLES)
        assessment.keep(run.folder.path, "after" if best else "before", kept)


def _keep_examples(run: Run) -> None:
    """Save the best model's wrong answers and some right ones for the report, with the text of their rows."""
    data, accepted = run.setup.recipe.data, run.setup.objective.traits.rows
    sources = list(eval_sources(data).values()) or data.train
    chosen = assessment.read(run.folder.path).get("after", {}).get("answers") or {}
    if any(source.streaming for source in sources):
        return
    try:
        shown = {name: examples.with_rows(answers, sources, accepted) for name, answers in chosen.items()}
    except (DataError, OSError):  # the data files are gone; the run finishes without examples
        return
    assessment.keep(run.folder.path, "examples", shown)


def _assessment(run: Run, position: Progression) -> JsonObject | None:
    """Return the assessment of the saved model; None for a run without evaluation."""
    kept = assessment.read(run.folder.path)
    after = kept.get("after")
    if after is None or after["step"] != position.best_step:
        return None
    name = run.setup.recipe.train.best_figure or run.setup.objective.traits.best[0]
    return assessment.assess(after, kept.get("before"), name)


def _before_and_after(names: Sequence[str], first: JsonObject, best: JsonObject) -> JsonObject:
    """Return the figures before training and those of the saved model."""
    figures: JsonObject = {}
    for name in names:
        figures |= {f"{name}_before": first.get(name), name: best.get(name)}
    return figures


def _samples(run: Run, position: Progression) -> list[JsonObject]:
    """Return each sample prompt with its answer before training and that of the saved model.

    ``before_cut`` and ``after_cut``: number of tokens of an answer that was cut before it ended."""
    answers = metrics_file.read(run.answers.path)
    after = {record["prompt"]: record for record in answers if record["step"] == position.best_step}
    samples = []
    for record in (one for one in answers if one["step"] == 0):
        later = after.get(record["prompt"], {})
        cuts = {"before_cut": record.get("cut"), "after_cut": later.get("cut")}
        samples.append({
            "prompt": record["prompt"],
            "before": record["answer"],
            "after": later.get("answer"),
            "reference": record["reference"],
            **{name: cut for name, cut in cuts.items() if cut},
        })  # fmt: skip
    return samples
