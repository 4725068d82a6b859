"""Turn a recipe into a run: set up, train, save, report. ``train`` and ``check`` are the public functions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import machine
from tunesmith import recipe as recipes
from tunesmith.errors import (
    DiskError,
    GradientOverflowError,
    Interrupted,
    NonFiniteError,
    RecipeError,
    TunesmithError,
)  # fmt: skip
from tunesmith.json_types import JsonObject
from tunesmith.models.fast import kernels
from tunesmith.recipe import Recipe
from tunesmith.report import run_page
from tunesmith.runs import metrics_file
from tunesmith.runs import run_folder as folder
from tunesmith.runs.progress import Progress
from tunesmith.runs.trackers import Trackers, describe_run, mute_trackers, require
from tunesmith.train import (
    distributed,
    evaluation,
    fast_path,
    forecast,
    frozen_body_cache,
    held_out_answers,
    loop,
    memory_budget,
    outcome,
    rehearsal,
    resumption,
    run_state,
    samples,
    setup,
    starting_point,
    time_plan,
)  # fmt: skip
from tunesmith.train.callbacks import Callbacks
from tunesmith.train.loop import Job
from tunesmith.train.progression import Progression, record_best
from tunesmith.train.run_state import Run

if TYPE_CHECKING:
    from rich.console import Console


def train(
    recipe: Recipe | JsonObject | str | Path,
    *,
    out: str | Path | folder.RunFolder | None = None,
    resume: bool = False,
    restart: bool = False,
    overrides: Sequence[str] = (),
    deepspeed: str | Path | None = None,
    console: Console | None = None,
    on_log: Callable[[JsonObject], object] | None = None,
    on_eval: Callable[[JsonObject], object] | None = None,
    on_save: Callable[[Path, int], object] | None = None,
    spent: float = 0.0,
) -> JsonObject:
    """Train the model of ``recipe`` (a path, a mapping or a Recipe) and write the run folder ``out``.

    ``overrides``: ``key=value`` strings. ``resume``: continue from the last good checkpoint in ``out``.
    ``restart``: start again from step 0 there, and move the files of the previous attempt to ``replaced-N/``.
    ``out`` may be a folder that ``runs.run_folder.claim`` returned.
    ``deepspeed``: a ds_config.json for ZeRO-2 (see ``train.deepspeed_zero``). ``console``: a rich console
    that shows progress; None shows nothing. ``on_log(record)``, ``on_eval(record)`` and ``on_save(folder,
    step)`` are called in the main process for each record and each checkpoint. A callback that returns True
    ends the run after the current step. A callback that raises stops the run after a checkpoint is saved (see
    ``train.callbacks``). ``spent``: seconds of ``train.max_minutes`` that the caller has used already.

    Returns eval_loss_before, eval_loss, perplexity_before, perplexity, tokens_per_second, peak_memory_bytes
    (above the memory that the process held before the model), trainable_parameters, total_parameters,
    model_dir, run_dir, report, steps, best_step, tokens, train_seconds, samples, stopped and verdict. An
    objective with a reference adds reference_seconds. ``data.eval.sets`` adds eval_sets (their names) and,
    for each set, eval_NAME_loss and eval_NAME_perplexity, also with the suffix _before. With several
    processes the main process returns these keys, the others return an empty mapping.

    Raises UserError before weights load; StoppedError (loss not finite, disk full) and Interrupted with the
    last checkpoint kept; and the error that a callback raised.
    """
    started = time.perf_counter() - spent
    replaced: list[str] = []
    checked = recipes.resolve(recipe, overrides, replaced.append)
    require(checked.train.report_to)
    for key, function in (("on_log", on_log), ("on_eval", on_eval), ("on_save", on_save)):
        if function is not None and not callable(function):
            raise RecipeError(f"{key}: expected a function, got {function!r}")
    processes = distributed.state()
    main = processes.is_main_process
    run_folder = resumption.claim(recipe, out, folder.start_of(resume, restart), main)
    kernels.keep_freed_memory()
    # only the main process calls them; the other processes need to know whether there are any
    callbacks = Callbacks(on_log, on_eval, on_save)
    try:
        with (
            Progress(console if main else None) as progress,
            mute_trackers(checked.train.report_to if main else []),
        ):
            for line in replaced:
                progress.note(line)
            step, changed_keys = distributed.broadcast(
                resumption.choose(run_folder, checked, progress) if main else (None, [])
            )
            with distributed.main_first() if checked.data.cache else nullcontext():
                ds_config = Path(deepspeed) if deepspeed else None
                steps = time_plan.recorded_steps(run_folder)
                ready = setup.read(checked, processes.device, progress.note, ds_config, steps)
            started_with = starting_point.StartingPoint(ready)
            result = resumption.finished_result(run_folder, ready, started_with, step, progress)
            if result is not None:
                return result if main else {}
            kernels.return_freed_memory()  # of a run before this one, in the same process
            machine.reset_peak_memory()
            memory_before_model = machine.peak_memory_bytes()
            memory_budget.check_weights(ready, memory_budget.limit_bytes(ready.device))
            if main:
                run_folder.begin(checked.resolved())
            run, built = _open(ready, run_folder, started_with, progress, callbacks)
            position = run_state.restore(run, step)
            job = _prepare(run, built, position, changed_keys, started)
            with _recorded_failure(run):
                stopped = _stop_at_start(run, job, position) or loop.fit(job, position)
                run_state.require_finite_evaluation(run)
            return _finish(run, job, position, memory_before_model, stopped)
    finally:
        run_folder.close()


def check(
    recipe: Recipe | JsonObject | str | Path,
    overrides: Sequence[str] = (),
    *,
    measure: bool = False,
    memory_limit_bytes: int | None = None,
    spent: float = 0.0,
    known: Callable[[JsonObject], None] = lambda facts: None,
    say: Callable[[str], None] = lambda line: None,
) -> JsonObject:
    """Return what can be known before training: data and masks, steps, parameters, number formats.

    ``measure``: load the model, take a few real steps and add the key ``forecast`` (see
    ``train.forecast.forecast``). ``memory_limit_bytes``: plan for a machine with this much memory. ``spent``:
    seconds that this process has run so far, counted as part of the start of the run. ``known`` receives the
    result before the measurement, ``say`` each stage of the measurement. Raises UserError.
    """
    started = time.perf_counter() - spent
    notes: list[str] = []
    checked = recipes.resolve(recipe, overrides, notes.append)
    require(checked.train.report_to)
    if measure:
        kernels.keep_freed_memory()
    ready = setup.read(checked, distributed.state().device, notes.append)
    notes += time_plan.notes(ready)
    data_lines = set(ready.data.report.lines())
    facts: JsonObject = {
        "model": str(ready.model_folder.path),
        "objective": checked.resolved()["objective"],
        "adaptation": checked.resolved()["adaptation"],
        "data": ready.data.report.as_dict(),
        "steps": ready.source.plan.steps,
        "steps_per_epoch": ready.source.plan.steps_per_epoch,
        "learning_rate": checked.train.learning_rate,
        "max_length": ready.data.max_length,
        "trainable_parameters": ready.outline.trainable,
        "total_parameters": ready.outline.total,
        "trainable_percent": 100 * ready.outline.trainable / ready.outline.total,
        "precision": ready.precision.as_dict(),
        "notes": [line for line in notes if line not in data_lines],
    }
    if not measure:
        return facts
    known(facts)
    return {**facts, "forecast": forecast.forecast(ready, started, memory_limit_bytes, say)}


def _open(
    ready: setup.Setup,
    run_folder: folder.RunFolder,
    started_with: starting_point.StartingPoint,
    progress: Progress,
    callbacks: Callbacks,
) -> tuple[Run, setup.Built]:
    """Load the model and open the run's files."""
    built = setup.build(ready, run_folder.path)
    main = distributed.state().is_main_process
    metrics, answers = (_records(run_folder, name, main) for name in ("metrics.jsonl", "samples.jsonl"))
    run = Run(
        ready, run_folder, built.model, built.update, built.fast_path, metrics, answers, progress, main,
        callbacks, run_folder.manifest() != {}, started_with,
    )  # fmt: skip
    if main and ready.objective.traits.head == "lm":
        run.prompts = samples.prompts(ready.recipe.samples, ready.data.eval, ready.tokenizer)
    answer_notes = ready.prompts.notes if ready.prompts else []
    for line in [*built.notes, *answer_notes, outcome.parameters_line(ready), outcome.precision_line(ready)]:
        progress.note(line)
    return run, built


def _prepare(
    run: Run, built: setup.Built, position: Progression, changed_keys: Sequence[str], started: float
) -> Job:
    """Make the loop's job, with the micro-batch size, the planned steps, the reference and the trackers.

    ``changed_keys``: recipe keys that differ from those the run started with. ``started``: when the program
    began, by ``time.perf_counter``.
    """
    ready, progress = run.setup, run.progress
    if changed_keys:
        progress.note(f"changed since the run was started, with the same result: {', '.join(changed_keys)}")
    if "train.micro_batch_tokens" in changed_keys:
        position.micro_batch_tokens = 0
    frozen_body_cache.install(ready, built, progress.note)
    job = _job(run, built, position)
    ready.session.append, ready.session.doing = job.log, lambda activity: progress.doing(activity or None)
    ready.session.note, ready.session.folder = progress.note, run.folder.checkpoints
    reference_seconds = rehearsal.rehearse(run, job, position, started)
    if run.main:
        outcome.record_start(run, job.budget)
        if reference_seconds:
            run.folder.record(reference_seconds=reference_seconds)
        run.trackers = _trackers(run)
    progress.start(position.step, run.setup.source.plan.steps)
    return job


def _finish(
    run: Run, job: Job, position: Progression, memory_before_model: int, stopped: str | None
) -> JsonObject:
    """Save the model unless an evaluation did, write the report, and return the result."""
    if run.setup.data.eval is None or position.best_step is None:
        run_state.save_model(run)
    run.progress.stop()
    result = outcome.finish(run, position, job, memory_before_model, stopped) if run.main else {}
    run.callbacks.raise_failure()
    return result


def _job(run: Run, built: setup.Built, position: Progression) -> Job:
    ready, config = run.setup, run.setup.recipe.train
    compute = ready.precision.compute
    budget = position.micro_batch_tokens or memory_budget.first_budget(config, ready.device, compute)
    job = Job(
        model=built.model, objective=ready.objective, update=built.update, source=ready.source, config=config,
        layout=built.fast_path.layout, budget=budget,
        device=ready.device, noise=built.noise, log=lambda record: _log(run, record),
        evaluate=lambda now: _evaluate(run, now, job.budget), save=lambda now: _save(run, now),
        stop_requests=run.callbacks.stop_requests,
    )  # fmt: skip
    return job


def _stop_at_start(run: Run, job: Job, position: Progression) -> str | None:
    """Evaluate step 0 of a new run. Returns why a callback ends the run there, or None."""
    if position.step or distributed.broadcast(_was_evaluated(run)):
        return None
    _evaluate(run, position, job.budget)
    ending, failure = distributed.broadcast(run.callbacks.stop_requests())
    if failure:
        raise Interrupted(f"stopped by {failure} before the first step")
    return ending


def _was_evaluated(run: Run) -> bool:
    """Return whether a checkpoint of step 0 is continued, whose evaluation is recorded."""
    return run.main and any(one["kind"] == "eval" for one in metrics_file.read(run.metrics.path))


@contextmanager
def _recorded_failure(run: Run) -> Iterator[None]:
    """Write what stopped the run into its manifest and report."""
    try:
        yield
    except TunesmithError as error:
        run.trackers.close()
        if run.main:
            with suppress(DiskError):  # report the first error, not this one
                run.folder.record(notes=outcome.notes(run), stopped=f"{type(error).__name__}: {error}")
                run_page.write_report(run.folder.path)
        if isinstance(error, NonFiniteError | GradientOverflowError | Interrupted):
            distributed.wait()  # every process raises these: none may exit before the report is written
        run.callbacks.raise_failure()
        raise
    finally:
        run.trackers.close()


def _trackers(run: Run) -> Trackers:
    names = run.setup.recipe.train.report_to
    if not names:
        return run.trackers
    records = metrics_file.read(run.metrics.path)
    created = run.folder.manifest()["created"]
    about = describe_run(run.folder.path, created, run.setup.recipe.resolved(), records, run.resumed)
    return Trackers(names, about, run.progress.note)


def _records(run_folder: folder.RunFolder, name: str, main: bool) -> metrics_file.Metrics:
    """Open the file of that name. Opening repairs a torn last line, so only the main process does it."""
    return metrics_file.Metrics(run_folder.path / name if main else os.devnull)


# ------------------------------------------------------------------------ functions that the loop calls


def _log(run: Run, record: JsonObject) -> None:
    if run.main:
        record = {**record, "memory_bytes": machine.memory_bytes(), "time": time.time()}
        run.metrics.append(record)
        run.trackers.log(record)
        if record["kind"] == "train":
            run.progress.log(record)
            if (warning := run.update.ratio.warning()) is not None:
                run.progress.note(warning)
        elif record["kind"] == "rollout":
            run.progress.rollout(record)
        elif record["kind"] == "warning":
            run.progress.note(f"step {record['step']}: warning: {record['warning']}")
        elif record["kind"] == "memory":
            run.progress.note(
                f"step {record['step']} ran out of memory: micro-batches now have at most "
                f"{record['micro_batch_tokens']:,} tokens instead of {record['before']:,}; the result is the same"
            )
        run.callbacks.call("on_log", record)
    if run.callbacks.any_given and record["kind"] == "train":
        distributed.wait()  # a callback may take longer than a collective waits


def _save(run: Run, position: Progression) -> None:
    run_state.save(run, position)
    if run.main:
        run.callbacks.call("on_save", run.folder.checkpoints / f"step-{position.step}", position.step)
    if run.callbacks.any_given:
        distributed.wait()


def _evaluate(run: Run, position: Progression, budget: int) -> float | None:
    """Evaluate, save the best model, answer the sample prompts. Returns the deciding figure."""
    ready = run.setup
    if ready.data.eval is None:
        return None
    run.progress.doing("evaluating")
    run_state.require_finite(run, position.step, run.update.masters.parameters)
    started = time.perf_counter()
    figures, records = evaluation.measure(
        run.model, ready.objective, ready.data.eval, run.fast_path.layout, budget, ready.device,
        ready.data.eval_sets, choose_threshold=True, session=ready.session,
    )  # fmt: skip
    answers = held_out_answers.evaluate(ready.session, ready.prompts) if ready.prompts else None
    figures |= answers.figures if answers else {}
    ready.session.evaluation = figures
    seconds = time.perf_counter() - started
    name, direction = evaluation.deciding_figure(ready.recipe.train, ready.objective.traits)
    evaluation.check_reported(name, figures)
    threshold = ready.recipe.train.early_stopping_threshold
    best = position.step > 0 and record_best(position, figures[name], direction, threshold)
    if best:
        run_state.save_model(run)
    epoch = round(ready.source.plan.epoch(position.step), 6)
    record: JsonObject = {"kind": "eval", "step": position.step, "epoch": epoch, **figures}
    record |= {"best": best, "seconds": seconds, "time": time.time()}
    if run.main:
        outcome.keep_evaluation(run, position.step, best, records, answers)
        run.metrics.append(record)
        run.trackers.log(record)
        run.progress.evaluation(record)
        _answer_prompts(run, position.step)
        run.callbacks.call("on_eval", record)
    distributed.wait()
    run.progress.doing(None)
    return figures[name]


def _answer_prompts(run: Run, step: int) -> None:
    if run.prompts:
        length = run.setup.recipe.samples.max_new_tokens
        with fast_path.plain_attention(run.model, run.fast_path):
            answers = samples.answer(run.setup.session.engine, run.prompts, length)
        for prompt, answer in zip(run.prompts, answers, strict=True):
            record = {"step": step, "prompt": prompt.text, "answer": answer.text}
            cut = {} if answer.cut is None else {"cut": answer.cut}
            run.answers.append({**record, "reference": prompt.reference, **cut})
