"""Plan the stages of a pipeline, train those that are due, and summarise all.

    runs/NAME/  STAGE/ (run folders)  manifests/STAGE.json  replaced/STAGE-N/  summary.json  report.html

A kill at any moment loses nothing: the manifest of a stage is written before its run folder is made, and gets
the fingerprint of the result after the run has ended. The same command resumes the interrupted stage.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import torch

from tunesmith import __version__, adaptations, files, machine, objectives
from tunesmith.errors import DiskError, Interrupted, RewardError, TunesmithError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.fast import kernels
from tunesmith.pipeline import answer_comparison, stage_checks, stage_manifest
from tunesmith.pipeline.pipeline_file import Pipeline, Stage
from tunesmith.pipeline.stage_manifest import Manifest
from tunesmith.report import pipeline_page
from tunesmith.runs import run_folder, run_list
from tunesmith.train import checkpoint, run

if TYPE_CHECKING:
    from rich.console import Console

Action = Literal["train", "resume", "unchanged", "not run"]
Note = Callable[[str], None]

SUMMARY = "summary.json"
RESULTS = (
    "steps", "best_step", "train_seconds", "tokens_per_second", "peak_memory_bytes", "model_dir", "stopped",
)  # fmt: skip
"""Keys of a run's result that the summary repeats."""


@dataclass(frozen=True)
class PlannedStage:
    """``reasons``: why the stage is trained, or not. ``facts``: its new manifest, None until its inputs exist.

    ``current``: its result is there, and made of what its recipe names now."""

    stage: Stage
    action: Action
    reasons: tuple[str, ...]
    facts: Manifest | None = None
    current: bool = False

    @property
    def due(self) -> bool:
        return self.action in ("train", "resume")

    def as_dict(self) -> JsonObject:
        return {"stage": self.stage.name, "action": self.action, "reasons": list(self.reasons)}


def plan(pipeline: Pipeline, first: str | None = None, last: str | None = None) -> list[PlannedStage]:
    """Return what happens to each stage. ``first`` and ``last``: names of ``--from`` and ``--until``.

    Raises UserError if a stage cannot be planned: data or a model are missing, or a result that ``first``
    needs.
    """
    names = [stage.name for stage in pipeline.stages]
    start = names.index(pipeline.stage(first).name) if first else 0
    end = names.index(pipeline.stage(last).name) if last else len(names) - 1
    if end < start:
        raise UserError(f"--until {last} comes before --from {first}: nothing would run")
    planned: list[PlannedStage] = []
    for number, stage in enumerate(pipeline.stages):
        with naming_stage(stage):
            if number < start:
                planned.append(_kept(pipeline, stage, str(first)))
                continue
            inputs = stage.inputs.values()
            awaited = [one.stage.name for one in planned if one.stage.name in inputs and not one.current]
            if awaited:
                one = PlannedStage(stage, "train", (f"its input, {' and '.join(awaited)}, is trained first",))
            else:
                one = decide(pipeline, stage)
            left_out = number > end
            planned.append(
                replace(one, action="not run", reasons=(f"after --until {last}",)) if left_out else one
            )
    return planned


def _kept(pipeline: Pipeline, stage: Stage, first: str) -> PlannedStage:
    """Return the plan of a stage before ``--from``, whose result is taken as it is."""
    recorded = stage_manifest.read(pipeline, stage) or {}
    if problem := stage_manifest.result_problem(pipeline, stage, recorded):
        raise UserError(f"--from {first} takes the result of this stage, but {problem}. Leave out --from.")
    return PlannedStage(stage, "not run", (f"before --from {first}",), current=True)


def decide(pipeline: Pipeline, stage: Stage) -> PlannedStage:
    """Return whether a stage whose inputs exist is trained, resumed or left unchanged, and why."""
    facts, recorded = stage_manifest.describe(pipeline, stage), stage_manifest.read(pipeline, stage)
    started = (stage.folder / "recipe.yaml").is_file()
    if recorded is None:
        if started:
            raise UserError(
                f"{stage.folder} holds a run that this pipeline did not start. Move it, or name another folder with --out."
            )
        return PlannedStage(stage, "train", ("not trained yet",), facts)
    changed = stage_manifest.changes(recorded, facts)
    if changed and not (started and _is_corrected_reward(stage, recorded, changed)):
        return PlannedStage(stage, "train", tuple(changed), facts)
    problem = stage_manifest.result_problem(pipeline, stage, recorded)
    if problem is None:
        return PlannedStage(stage, "unchanged", (), facts, current=True)
    if recorded.get("result") is not None:
        return PlannedStage(stage, "train", (problem,), facts)
    if not started:
        return PlannedStage(stage, "train", ("not trained yet",), facts)
    step, damaged = checkpoint.newest(stage.folder / "checkpoints")
    if step is None:
        try:
            run_folder.check_nothing_lost(run_folder.RunFolder(stage.folder), damaged)
        except UserError:
            return PlannedStage(
                stage, "train", ("interrupted, and its checkpoints are damaged or gone",), facts
            )
    where = "before its first checkpoint" if step is None else f"after the checkpoint of step {step}"
    return PlannedStage(stage, "resume", (f"interrupted {where}", *changed), facts)


def _is_corrected_reward(stage: Stage, recorded: Manifest, changed: Sequence[str]) -> bool:
    """Return whether a reward stopped the stage and nothing but code or files that rewards name changed since.

    The stage then goes on: its sampled answers are scored by the corrected reward."""
    stopped = str(run_list.read(stage.folder).manifest.get("stopped") or "")
    failed = recorded.get("result") is None and stopped.startswith(f"{RewardError.__name__}:")
    return failed and all(line.startswith("files: ") for line in changed)


@contextmanager
def naming_stage(stage: Stage) -> Iterator[None]:
    """Add the name of the stage, and its line, to the error of this block."""
    try:
        yield
    except TunesmithError as error:
        error.args = (f"{stage.where}: stage {stage.name}: {error}",)
        raise


def run_pipeline(
    pipeline: Pipeline,
    *,
    first: str | None = None,
    last: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    note: Note = lambda line: None,
) -> JsonObject:
    """Train all stages that are due, in order, and return the summary; with ``dry_run`` only the plan.

    ``note`` receives progress lines, ``console`` shows the progress of each run. Raises UserError before the
    first stage starts for all that can be known then; an error of a stage names it, and leaves the results
    before it.
    """
    if dry_run:
        planned = _checked_plan(pipeline, first, last, note)
        shown = [one.as_dict() for one in planned]
        return {"pipeline": str(pipeline.file), "out": str(pipeline.folder), "plan": shown}
    files.make_folder(pipeline.folder)
    lock = run_folder.take_lock(pipeline.folder)
    try:
        planned = _checked_plan(pipeline, first, last, note)
        for number, one in enumerate(planned):
            with naming_stage(one.stage):
                planned[number] = _run_stage(
                    pipeline, one, f"stage {number + 1} of {len(planned)}", console, note
                )
            if one.due:
                _save(pipeline, planned, None)
        current = [one.stage for one in planned if one.current]
        return _save(
            pipeline, planned, answer_comparison.compare(pipeline, current, _last_comparison(pipeline), note)
        )
    finally:
        lock.close()


def _checked_plan(pipeline: Pipeline, first: str | None, last: str | None, note: Note) -> list[PlannedStage]:
    planned = plan(pipeline, first, last)
    due = [one.stage for one in planned if one.due]
    if due:
        note(f"checking {len(due)} of {len(planned)} stages before the first one starts")
        stage_checks.check(pipeline, due, frozenset(one.stage.name for one in planned if one.current), note)
    return planned


def _run_stage(
    pipeline: Pipeline, planned: PlannedStage, place: str, console: Console | None, note: Note
) -> PlannedStage:
    """Train one stage if it is due now that its inputs exist. Return what was done."""
    stage = planned.stage
    if planned.due:
        planned = decide(pipeline, stage)
    origin = f"the result of {stage.inputs['model']}" if "model" in stage.inputs else stage.recipe.model
    title = f"{place}: {stage.name}, {objectives.name_of(stage.recipe.objective)} on {origin}"
    note(f"{title}: {planned.action}" + (f" ({'; '.join(planned.reasons)})" if planned.reasons else ""))
    if not planned.due:
        return planned
    assert planned.facts is not None
    if planned.action == "train" and (target := stage_manifest.set_aside(pipeline, stage)):
        note(f"the files of the attempt before are in {target}")
    stage_manifest.write(pipeline, stage, planned.facts)
    _forget_last_run()
    try:
        run.train(stage.recipe, out=stage.folder, resume=planned.action == "resume", console=console)
    except (RewardError, DiskError, Interrupted) as error:
        again = "tunesmith pipeline needs no --resume: the same command goes on with this stage."
        error.args = (f"{error}\n  {again}",)
        raise
    result = stage_manifest.fingerprint(stage.folder, stage.recipe.trust_remote_code)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    stage_manifest.write(pipeline, stage, {**planned.facts, "result": result, "ended": ended})
    return replace(planned, current=True)


def _forget_last_run() -> None:
    """Free the memory of the last stage, and measure the peak of the next one from here."""
    gc.collect()  # a network is part of a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    kernels.return_freed_memory()
    machine.reset_peak_memory()


def _last_comparison(pipeline: Pipeline) -> JsonObject:
    path = pipeline.folder / SUMMARY
    return (run_folder.read_mapping(path) if path.exists() else {}).get("comparison") or {}


def _facts(planned: PlannedStage) -> JsonObject:
    """Return what the summary holds of a stage; the figures come from its run folder."""
    stage = planned.stage
    facts: JsonObject = {
        "stage": stage.name,
        "action": planned.action,
        "current": planned.current,
        "objective": objectives.name_of(stage.recipe.objective),
        "adaptation": adaptations.name_of(stage.recipe.adaptation),
        "model": stage.inputs.get("model") or stage.recipe.model,
        "inputs": dict(stage.inputs),
        "recipe": stage.source,
    }
    if not planned.current:
        return facts
    result = run_list.read(stage.folder).manifest.get("result") or {}
    names = [name for name in result.get("figures", ()) if result.get(name) is not None]
    return {
        **facts,
        "figures": {name: [result.get(f"{name}_before"), result[name]] for name in names},
        "verdict": (result.get("assessment") or {}).get("verdict") or [],
        **{key: result.get(key) for key in RESULTS},
        "run_dir": str(stage.folder),
        "report": str(stage.folder / "report.html"),
    }


def _save(pipeline: Pipeline, planned: Sequence[PlannedStage], comparison: JsonObject | None) -> JsonObject:
    """Write the summary and its page, and return the summary."""
    facts: JsonObject = {
        "pipeline": str(pipeline.file),
        "out": str(pipeline.folder),
        "tunesmith": __version__,
        "report": str(pipeline.folder / "report.html"),
        "stages": [_facts(one) for one in planned],
        "comparison": comparison,
    }
    content = json.dumps(facts, indent=1, ensure_ascii=False, default=str)
    files.replace_file(pipeline.folder / SUMMARY, content.encode("utf-8", "replace"))
    pipeline_page.write(pipeline.folder, facts)
    return facts
