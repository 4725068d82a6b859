"""A recipe becomes a run: set up, train, keep, report. ``train`` and ``check`` are the public functions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith import recipe as recipes
from tunesmith.errors import GradientOverflowError, Interrupted, NonFiniteError, RecipeError, TunesmithError
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
    loop,
    machine,
    outcome,
    reference,
    run_state,
    samples,
    setup,
)
from tunesmith.train.callbacks import Hooks
from tunesmith.train.loop import Job, Progression
from tunesmith.train.run_state import Run


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    deepspeed: str | Path | None = None,
    console: Any = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    on_eval: Callable[[dict[str, Any]], Any] | None = None,
    on_save: Callable[[Path, int], Any] | None = None,
) -> dict[str, Any]:
    """Train as ``recipe`` says (a path, a mapping or a Recipe) into the run folder ``out``.

    ``overrides``: ``key=value`` strings. ``resume``: go on from the last good checkpoint of ``out``. ``deepspeed``: a
    ds_config.json, for ZeRO-2 (see ``train.deepspeed_zero``). ``console``: a rich console for progress, None = silent. ``on_log(record)``,
    ``on_eval(record)`` and ``on_save(folder, step)`` are called in the main process for each record and each checkpoint; one that
    returns True ends the run after this step, one that raises stops it after saving a checkpoint (see ``train.callbacks``).

    Returns eval_loss_before, eval_loss, perplexity_before, perplexity, tokens_per_second, peak_memory_bytes (above what the
    process held before the model), trainable_parameters, total_parameters, model_dir, run_dir, report, steps, best_step,
    tokens, train_seconds, samples, stopped and verdict; with a reference also reference_seconds; with ``data.eval.sets`` also
    eval_sets (their names) and eval_NAME_loss and eval_NAME_perplexity, each with its _before. Of several processes only the
    main one returns them, the others an empty mapping.

    Raises UserError before weights load, StoppedError (not finite, disk full) and Interrupted with the last checkpoint
    kept, and whatever one of the functions raised.
    """
    chosen = _resolve(recipe, overrides)
    require(chosen.train.report_to)
    target = Path(
        out or Path("runs") / (Path(recipe).stem if isinstance(recipe, str | Path) else "run")
    ).resolve()
    processes = distributed.state()
    main = processes.is_main_process
    changed = folder.check_resumable(target, chosen.resolved()) if resume else []
    if main and not resume:
        folder.check_free(target)
    kernels.keep_freed_memory()
    for name, function in (("on_log", on_log), ("on_eval", on_eval), ("on_save", on_save)):
        if function is not None and not callable(function):
            raise RecipeError(f"{name}: expected a function, got {function!r}")
    hooks = Hooks(
        on_log, on_eval, on_save
    )  # called in the main process; the others only know that there are some
    told = chosen.train.report_to if main else []
    with Progress(console if main else None) as progress, mute_trackers(told):
        with distributed.main_first() if chosen.data.cache else contextlib.nullcontext():
            ready = setup.read(
                chosen, processes.device, progress.note, Path(deepspeed) if deepspeed else None
            )
        run_folder = folder.take(target, chosen.resolved()) if main else folder.RunFolder(target)
        try:
            return _run(ready, run_folder, progress, main, hooks, changed)
        finally:
            run_folder.close()


def check(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    measure: bool = False,
    memory_limit_bytes: int | None = None,
    spent: float = 0.0,
    known: Callable[[dict[str, Any]], None] = lambda facts: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All that can be known before training: data and masks, steps, parameters, number formats. Raises UserError.

    ``measure``: load the model too and take a few real steps; ``forecast`` of the result says what the run will need (see
    ``train.forecast.forecast``). ``memory_limit_bytes``: plan for a machine with so much; ``spent``: seconds that the process
    took so far, as a run's will too. ``known`` gets the result as it is before measuring, ``say`` is told what is being done.
    """
    started = time.perf_counter() - spent
    chosen = _resolve(recipe, overrides)
    require(chosen.train.report_to)
    if measure:
        kernels.keep_freed_memory()
    said: list[str] = []
    ready = setup.read(chosen, distributed.state().device, said.append)
    of_the_data = set(ready.data.report.lines())
    facts: dict[str, Any] = {
        "model": str(ready.model_folder.path),
        "objective": chosen.resolved()["objective"],
        "adaptation": chosen.resolved()["adaptation"],
        "data": ready.data.report.as_dict(),
        "steps": ready.source.plan.steps,
        "steps_per_epoch": ready.source.plan.steps_per_epoch,
        "learning_rate": chosen.train.learning_rate,
        "max_length": ready.data.max_length,
        "trainable_parameters": ready.outline.trainable,
        "total_parameters": ready.outline.total,
        "trainable_percent": 100 * ready.outline.trainable / ready.outline.total,
        "precision": ready.precision.as_dict(),
        "notes": [line for line in said if line not in of_the_data],
    }
    if not measure:
        return facts
    known(facts)
    return {**facts, "forecast": forecast.forecast(ready, started, memory_limit_bytes, say)}


def _resolve(recipe: Recipe | dict[str, Any] | str | Path, overrides: Sequence[str]) -> Recipe:
    """The checked recipe with the adaptation's own learning rate filled in."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides go with a path or a mapping; this recipe is already built")
        chosen = recipe
    elif isinstance(recipe, dict):
        chosen = recipes.parse(recipe, overrides)
    else:
        chosen = recipes.load(recipe, overrides)
    if chosen.train.learning_rate is not None:
        return chosen
    from tunesmith import adaptations

    default = adaptations.module(adaptations.name_of(chosen.adaptation)).Adaptation.learning_rate
    return chosen.model_copy(update={"train": chosen.train.model_copy(update={"learning_rate": default})})


def _run(
    ready: setup.Setup,
    run_folder: folder.RunFolder,
    progress: Progress,
    main: bool,
    hooks: Hooks,
    changed: Sequence[str],
) -> dict[str, Any]:
    """``changed``: keys of the recipe that are not as they were when the run was started."""
    before_model = machine.peak_memory_bytes()
    forecast.check_weights(ready, forecast.limit_bytes(ready.device))
    built = setup.build(ready, run_folder.path)
    run = Run(
        ready, run_folder, built.model, built.update, built.route, _records(run_folder, "metrics.jsonl", main),
        _records(run_folder, "samples.jsonl", main), progress, main, hooks,
    )  # fmt: skip
    run.asked = (
        samples.prompts(ready.recipe.samples, ready.data.eval, ready.tokenizer)
        if main and ready.objective.traits.head == "lm"
        else []
    )
    for line in [*built.notes, outcome.parameters_line(ready), outcome.precision_line(ready)]:
        progress.note(line)
    resumed = run_folder.manifest() != {}
    at = run_state.restore(run)
    if at.step >= ready.source.plan.steps and (kept := run_folder.manifest().get("result")):
        progress.note(
            "the run is finished already: nothing is left to train, and what is kept of it stays as it is"
        )
        return kept if main else {}
    if changed:
        progress.note(f"changed since the run was started, with the same result: {', '.join(changed)}")
    if "train.micro_batch_tokens" in changed:
        at.micro_batch_tokens = 0
    frozen_body_cache.keep(ready, built, progress.note)
    train_config = ready.recipe.train
    job = Job(
        model=built.model, objective=ready.objective, update=built.update, source=ready.source, config=train_config,
        layout=built.route.layout, budget=at.micro_batch_tokens or forecast.first_budget(train_config, ready.device),
        device=ready.device, noise=built.noise, log=lambda record: _log(run, record),
        evaluate=lambda now: _evaluate(run, now, job.budget), save=lambda now: _save(run, now), wants=hooks.wants,
    )  # fmt: skip
    session, compared = ready.session, 0.0
    session.append = job.log
    if at.step < ready.source.plan.steps:
        progress.doing("trying the heaviest micro-batch")
        asked, automatic = job.budget, train_config.micro_batch_tokens == "auto" and not at.micro_batch_tokens
        forecast.settle(job, automatic)
        if automatic or job.budget < asked:
            progress.note(
                f"micro-batches have at most {job.budget:,} tokens, which fits into memory; the result is the same for any"
            )
        session.budget = job.budget
        if ready.reference is not None:
            progress.doing("computing the reference")
            compared = reference.take(ready.reference, ready.objective, session, ready.seen(), progress.note)
        progress.doing(None)
    if main:
        outcome.record_start(run, job.budget)
        if compared:
            run_folder.record(reference_seconds=compared)
        run.trackers = _trackers(run, resumed)
    progress.start(at.step, ready.source.plan.steps)
    ending = None
    try:
        if at.step == 0:
            _evaluate(run, at, job.budget)
            ending, failing = distributed.same(hooks.wants())
            if failing:
                raise Interrupted(f"stopped by {failing} before the first step")
        stopped = ending or loop.fit(job, at)
    except TunesmithError as error:
        run.trackers.close()
        if main:
            run_folder.record(notes=outcome.notes(run), stopped=f"{type(error).__name__}: {error}")
            run_page.write_report(run_folder.path)
        if isinstance(error, NonFiniteError | GradientOverflowError | Interrupted):
            distributed.wait()  # all processes are here: none ends before the report is written
        hooks.again()
        raise
    finally:
        run.trackers.close()
    if ready.data.eval is None or at.best_step is None:
        run_state.save_model(run)
    progress.stop()
    result = outcome.finish(run, at, job, before_model, stopped) if main else {}
    hooks.again()
    return result


def _trackers(run: Run, resumed: bool) -> Trackers:
    names = run.setup.recipe.train.report_to
    if not names:
        return run.trackers
    before = metrics_file.read(run.metrics.path)
    created = run.folder.manifest()["created"]
    about = describe_run(run.folder.path, created, run.setup.recipe.resolved(), before, resumed)
    return Trackers(names, about, run.progress.note)


def _records(run_folder: folder.RunFolder, name: str, main: bool) -> metrics_file.Metrics:
    """The file of that name. Only the main process may open it, because that mends a torn last line; the others write nothing."""
    return metrics_file.Metrics(run_folder.path / name if main else os.devnull)


# ------------------------------------------------------------------------------------------- what the loop calls back


def _log(run: Run, record: dict[str, Any]) -> None:
    if run.main:
        record = {**record, "memory_bytes": machine.memory_bytes(), "time": time.time()}
        run.metrics.append(record)
        run.trackers.log(record)
        if record["kind"] == "train":
            run.progress.log(record)
            if (warning := run.update.ratio.warning()) is not None:
                run.progress.note(warning)
        elif record["kind"] == "memory":
            run.progress.note(
                f"memory ran out in step {record['step']}: from now on micro-batches have at most "
                f"{record['micro_batch_tokens']:,} tokens instead of {record['before']:,}; the result is the same"
            )
        run.hooks.call("on_log", record)
    if run.hooks.given and record["kind"] == "train":
        distributed.wait()  # however long the user's function takes


def _save(run: Run, at: Progression) -> None:
    run_state.save(run, at)
    if run.main:
        run.hooks.call("on_save", run.folder.checkpoints / f"step-{at.step}", at.step)
    if run.hooks.given:
        distributed.wait()


def _evaluate(run: Run, at: Progression, budget: int) -> float | None:
    """Evaluate, keep the model when it is the best yet, answer the fixed prompts. Returns the figure that chooses the best."""
    ready = run.setup
    if ready.data.eval is None:
        return None
    run.progress.doing("evaluating")
    started = time.perf_counter()
    figures = evaluation.evaluate(
        run.model,
        ready.objective,
        ready.data.eval,
        run.route.layout,
        budget,
        ready.device,
        ready.data.eval_sets,
        choose_threshold=True,
    )
    seconds = time.perf_counter() - started
    name, direction = ready.objective.traits.best
    best = at.step > 0 and loop.improved(
        at, figures[name], direction, ready.recipe.train.early_stopping_threshold
    )
    if best:
        run_state.save_model(run)
    record = {
        "kind": "eval",
        "step": at.step,
        "epoch": round(ready.source.plan.epoch(at.step), 6),
        **figures,
        "best": best,
        "seconds": seconds,
    }
    if run.main:
        record["time"] = time.time()
        run.metrics.append(record)
        run.trackers.log(record)
        run.progress.evaluation(record)
        _answer(run, at.step)
        run.hooks.call("on_eval", record)
    distributed.wait()
    run.progress.doing(None)
    return figures[name]


def _answer(run: Run, step: int) -> None:
    if run.asked:
        with fast_path.plain_attention(run.model, run.route):
            answers = samples.answer(
                run.model, run.setup.tokenizer, run.asked, run.setup.recipe.samples.max_new_tokens
            )
        for prompt, answer in zip(run.asked, answers, strict=True):
            run.answers.append(
                {"step": step, "prompt": prompt.text, "answer": answer, "reference": prompt.reference}
            )
