"""Measure the memory and the time that a whole run needs on this machine.

``tunesmith check --measure`` prints the result of ``forecast``, and ``train.time_plan`` calls ``measure``.
Both time real steps, an evaluation and a save. They estimate no time from the shape of the network. Of a policy
that learns from its own answers they time the whole first iteration: sampling, rewards, log-probabilities and steps.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tunesmith import machine
from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Source, Step
from tunesmith.json_types import JsonObject
from tunesmith.runs import metrics_file
from tunesmith.runs.progress import Progress
from tunesmith.runs.run_folder import RunFolder
from tunesmith.train import distributed, fast_path, loop, memory_budget, run_state, samples, setup
from tunesmith.train.callbacks import Callbacks
from tunesmith.train.loop import Job
from tunesmith.train.memory_budget import PREVIEWED, SHARE
from tunesmith.train.progression import Progression
from tunesmith.train.run_state import Run
from tunesmith.train.train_config import times

MIN_STEPS, MAX_SECONDS = 2, 10.0
"""No further step is timed once ``MIN_STEPS`` are timed and ``MAX_SECONDS`` have passed."""

PLANNED_SHARE = 0.93
"""Share of ``train.max_minutes`` that the plan uses: the report and a busier machine need the rest."""

EVALUATED = 16
"""Most rows that one forward measurement times."""

ANSWERED = 64
"""Most prompts that the measurement of an evaluation answers: about as many as the engine takes at once."""


def forecast(
    ready: setup.Setup,
    started: float,
    limit: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> JsonObject:
    """Load the model, take real steps and return the memory and the time that the run needs.

    The measurement saves the model and a checkpoint once, in a temporary folder, and keeps no file.
    ``started``: ``time.perf_counter()`` at the start of the program. ``limit``: bytes that the process may
    hold; pass another machine's to plan for that machine. ``report`` is called with the name of each stage.

    Keys: micro_batch_tokens, heaviest_tokens, peak_memory_bytes (on a CPU without the bytes that the process
    held before the model, as in the result of a run), needed_memory_bytes and memory_limit_bytes (of the
    whole process), fits, remedies, seconds_per_step, tokens_per_second, train_seconds, evaluation_seconds (of
    one evaluation), evaluations, saving_seconds (of all saves), reference_seconds, total_seconds, steps.
    ``steps`` is below the plan's number if ``train.max_minutes`` limits it.
    """
    memory_before_model = machine.peak_memory_bytes()
    limit = memory_budget.limit_bytes(ready.device) if limit is None else limit
    memory_budget.check_weights(ready, limit)
    report("loading the model")
    # setup.build may write a merged base model into this folder; it must exist until the measurement ends
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        built = setup.build(ready, Path(folder))
        return _measure_run(ready, built, started, limit, memory_before_model, report)


@dataclass(frozen=True)
class Costs:
    """Measured seconds of each part of a run.

    ``step``, ``evaluation``, ``model`` and ``checkpoint``: one step, one evaluation, one save of each.
    ``first_extra``: extra seconds of the first step. ``reference``: the reference log-probabilities of the
    first ``reference_steps`` steps. ``seconds``: duration of the measurement.
    """

    step: float
    first_extra: float
    evaluation: float
    model: float
    checkpoint: float
    reference: float
    reference_steps: int
    seconds: float

    def parts(self, ready: setup.Setup, steps: int) -> JsonObject:
        """Return the seconds of each part of a run of ``steps`` steps, and its number of evaluations."""
        train, per_epoch = ready.recipe.train, ready.source.plan.steps_per_epoch
        evaluations = 0 if ready.data.eval is None else 1 + times(train.eval_steps, steps, per_epoch)
        saving = max(1, evaluations - 1) * self.model
        return {
            "train_seconds": steps * self.step + self.first_extra,
            "evaluation_seconds": self.evaluation,
            "evaluations": evaluations,
            "saving_seconds": saving + times(train.save_steps, steps, per_epoch) * self.checkpoint,
            "reference_seconds": self.reference * min(1.0, steps / self.reference_steps),
        }

    def total(self, ready: setup.Setup, steps: int) -> float:
        """Return the seconds of a run of ``steps`` steps, without its start-up (imports, model loading)."""
        parts = self.parts(ready, steps)
        evaluations = float(parts["evaluations"] * parts["evaluation_seconds"])
        return evaluations + float(sum(parts[f"{name}_seconds"] for name in ("train", "saving", "reference")))

    def most_steps(self, ready: setup.Setup, seconds: float) -> int:
        """Return the largest number of planned steps that take at most ``seconds``: whole iterations, at least
        one."""
        plan = ready.source.plan
        low, high = 1, -(-plan.steps // plan.steps_per_iteration)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.total(ready, middle * plan.steps_per_iteration) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return min(plan.steps, low * plan.steps_per_iteration)


def _measure_run(
    ready: setup.Setup,
    built: setup.Built,
    started: float,
    limit: int,
    memory_before_model: int,
    report: Callable[[str], None],
) -> JsonObject:
    train, plan, cuda = ready.recipe.train, ready.source.plan, ready.device.type == "cuda"
    job = Job(
        model=built.model, objective=ready.objective, update=built.update, source=ready.source, config=train,
        layout=built.fast_path.layout, budget=memory_budget.first_budget(train, ready.device, ready.precision.compute),
        device=ready.device, noise=built.noise, log=lambda record: None, evaluate=lambda position: None,
        save=lambda position: None,
    )  # fmt: skip
    report("trying the heaviest micro-batch")
    raised = memory_budget.make_room_for_lanes(job)
    memory_budget.settle(job, raised or train.micro_batch_tokens == "auto", limit)
    start_seconds = time.perf_counter() - started
    ready.session.budget = job.budget
    report("running an iteration" if ready.objective.traits.samples else "taking a few steps")
    timing = _time_steps(job, ready)
    memory = memory_budget.measure_memory(job, limit)  # again: the optimiser has allocated its state by now
    costs = _measure_costs(job, ready, built.fast_path, timing, report)
    peak = int(torch.cuda.max_memory_allocated(ready.device)) if cuda else machine.peak_memory_bytes()
    needed = max(peak, memory.peak)
    steps = plan.steps
    if train.max_minutes is not None:
        steps = costs.most_steps(ready, time_left(train.max_minutes, start_seconds))
    parts = costs.parts(ready, steps)
    fits, capacity = needed <= limit, memory.tokens_within(int(SHARE * limit))
    return {
        "micro_batch_tokens": job.budget,
        "heaviest_tokens": memory.heaviest.tokens,
        "peak_memory_bytes": max(0, needed - (0 if cuda else memory_before_model)),
        "needed_memory_bytes": needed,
        "memory_limit_bytes": limit,
        "fits": fits,
        "remedies": []
        if fits
        else memory_budget.remedies(job, memory, capacity, memory_budget.longest_row(job)),
        "steps": steps,
        "seconds_per_step": parts["train_seconds"] / steps,
        "steps_per_iteration": plan.steps_per_iteration,
        "tokens_per_second": timing.step_tokens * steps / parts["train_seconds"],
        **parts,
        "total_seconds": start_seconds + costs.total(ready, steps),
    }


def time_left(minutes: float, spent: float) -> float:
    """Return the seconds left for steps, evaluations and saving.

    ``minutes``: time limit of the run. ``spent``: seconds since its start.
    """
    return 60 * minutes * PLANNED_SHARE - spent


def measure(job: Job, ready: setup.Setup, chosen: fast_path.FastPath) -> Costs:
    """Time a few real steps, an evaluation and a save. The steps change the trained weights."""
    return _measure_costs(job, ready, chosen, _time_steps(job, ready), lambda stage: None)


def _measure_costs(
    job: Job,
    ready: setup.Setup,
    chosen: fast_path.FastPath,
    timing: StepTiming,
    report: Callable[[str], None],
) -> Costs:
    started = time.perf_counter()
    plan = ready.source.plan
    report("evaluating some rows")
    evaluation = _evaluation_seconds(job, ready, chosen)
    compared = [] if ready.reference is None else ready.all_examples()
    reference = sum(_forward_seconds(job, ready, step) for step in compared)
    report("saving the model and a checkpoint")
    model, checkpoint = _saving_seconds(job, ready, chosen)
    seconds = timing.seconds + time.perf_counter() - started
    return Costs(
        timing.step_tokens * timing.per_token + timing.update, timing.first_extra, evaluation, model, checkpoint, reference,
        min(plan.steps, plan.steps_per_epoch), seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class StepTiming:
    """Seconds per token (forward and backward), per optimiser update, and extra seconds of the first step.

    ``seconds``: duration of the measurement. ``step_tokens``: mean tokens of a step of the run. Where a policy
    samples, ``update`` is the whole time of a step: its share of an iteration.
    """

    per_token: float
    update: float
    first_extra: float
    seconds: float
    step_tokens: float


def _time_steps(job: Job, ready: setup.Setup) -> StepTiming:
    """Time real steps. Each takes different rows, because the first pass with a new shape is slower.

    The steps cover one interval of ``loop.TRIM_STEPS``, so that they reach the peak memory of a run. If steps
    are slow, the measurement ends after ``MAX_SECONDS``.
    """
    if ready.objective.traits.samples:
        return _time_iteration(job, ready)
    passes, tokens, first, first_tokens = 0.0, 0, 0.0, 0
    updates: list[float] = []
    began = time.perf_counter()
    for number, step in enumerate(_typical_steps(job.source, 1 + loop.TRIM_STEPS)):
        enough = len(updates) >= MIN_STEPS and time.perf_counter() - began > MAX_SECONDS
        if distributed.broadcast(enough):  # a step has collectives: all processes must take the same number
            break
        micro = loop.micro_batches(job, step)
        started = time.perf_counter()
        job.model.train()
        units = float(sum(job.objective.count(part.batch) for part in micro)) or 1.0
        while isinstance(
            outcome := loop.accumulation(job)(job, step, micro, units, job.update.backward), int
        ):
            micro = loop.halve(job, step, micro, outcome)
        loss, _ = outcome
        machine.synchronize(job.device)
        between = time.perf_counter()
        job.update.norm(loss.double())
        job.update.apply(step.number)
        machine.synchronize(job.device)
        step_tokens = sum(sum(part.lengths) for part in micro)
        if number == 0:
            first, first_tokens = time.perf_counter() - started, step_tokens
            continue
        passes += between - started
        updates.append(time.perf_counter() - between)
        tokens += step_tokens
    per_token, update = passes / max(1, tokens), sum(updates) / len(updates)
    first_extra = max(0.0, first - first_tokens * per_token - update)
    mean_tokens = _tokens_of_run(job.source) / job.source.plan.steps
    return StepTiming(per_token, update, first_extra, time.perf_counter() - began, mean_tokens)


def _time_iteration(job: Job, ready: setup.Setup) -> StepTiming:
    """Time the first iteration of a source that samples. The source and the run's records stay as they are."""
    plan, session, tokens = job.source.plan, ready.session, 0.0
    steps = min(plan.steps_per_iteration, plan.steps)
    kept, append = copy.deepcopy(job.source.state()), session.append
    session.append = lambda record: None
    began = ended = time.perf_counter()
    try:
        for step in job.source.steps(1):
            if step.number > steps:  # the iteration ended early
                break
            tokens += loop.train_step(job, step)["tokens"]
            ended = time.perf_counter()
            if step.number == steps:
                break
    finally:
        session.append = append
    job.source.load(*kept)
    return StepTiming(0.0, (ended - began) / steps, 0.0, time.perf_counter() - began, tokens / steps)


def _typical_steps(source: Source, number: int) -> list[Step]:
    """Return the ``number`` of the first 50 steps whose token counts are nearest to the run's mean.

    A shorter source repeats its steps.
    """
    first = source.preview(50)[:50]
    mean = _tokens_of_run(source) / source.plan.steps
    nearest = sorted(first, key=lambda step: abs(int(step.lengths.sum()) - mean))[:number]
    return [nearest[index % len(nearest)] for index in range(number)]


def _saving_seconds(job: Job, ready: setup.Setup, chosen: fast_path.FastPath) -> tuple[float, float]:
    """Save the model and a checkpoint; return the seconds of each."""
    runs = Path("runs") if Path("runs").is_dir() else Path()
    parent = runs if os.access(runs, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".tunesmith-", dir=parent) as name:
        folder, empty = RunFolder(Path(name)), metrics_file.Metrics(Path(name) / "metrics.jsonl")
        run = Run(
            ready, folder, job.model, job.update, chosen, empty, empty, Progress(None), True,
            Callbacks(), resumed=False,
        )  # fmt: skip
        started = time.perf_counter()
        run_state.save_model(run)
        between = time.perf_counter()
        run_state.save(run, Progression(step=1))
        return between - started, time.perf_counter() - between


def _tokens_of_run(source: Source) -> int:
    """Return the tokens of all steps, extrapolated from the mean of the first ``PREVIEWED``."""
    previewed = source.preview(PREVIEWED)[:PREVIEWED]
    tokens = sum(int(step.lengths.sum()) for step in previewed)
    return int(tokens * source.plan.steps / len(previewed))


def _evaluation_seconds(job: Job, ready: setup.Setup, chosen: fast_path.FastPath) -> float:
    """Return the seconds of one evaluation: the held-out rows and the sample prompts."""
    data, config = ready.data.eval, ready.recipe.samples
    if data is None:
        return 0.0
    held_out = Step(0, data, np.arange(len(data)), ready.objective.collate)
    measure = _answering_seconds if ready.objective.traits.samples else _forward_seconds
    seconds = measure(job, ready, held_out)
    if ready.objective.traits.head == "lm" and (prompts := samples.prompts(config, data, ready.tokenizer)):
        started = time.perf_counter()
        with fast_path.plain_attention(job.model, chosen):
            samples.answer(ready.session.engine, prompts, config.max_new_tokens)
        seconds += time.perf_counter() - started
    return seconds + _answer_seconds(ready)


def _answer_seconds(ready: setup.Setup) -> float:
    """Return the seconds of the answers to held-out prompts, extrapolated from some of them."""
    if ready.prompts is None:
        return 0.0
    some = ready.prompts.requests[:EVALUATED]
    started = time.perf_counter()
    ready.session.sample(some)
    return (time.perf_counter() - started) * len(ready.prompts.requests) / len(some)


def _answering_seconds(job: Job, ready: setup.Setup, step: Step) -> float:
    """Return the seconds of sampling and scoring an answer to each prompt of ``step``, extrapolated from some."""
    part = replace(step, rows=step.rows[:ANSWERED])
    started = time.perf_counter()
    job.objective.sample_records(ready.session, part)
    return (time.perf_counter() - started) * len(step) / len(part)


def _forward_seconds(job: Job, ready: setup.Setup, step: Step) -> float:
    """Return the seconds of a forward pass over ``step``, extrapolated from a sample across its lengths."""
    order = np.argsort(step.lengths, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(EVALUATED, len(order))).astype(int)]
    part = replace(step, rows=step.rows[chosen])
    job.model.eval()
    started = time.perf_counter()
    with torch.no_grad():
        for places in part.split(job.budget, job.layout):
            batch = part.collate(part.examples(places), job.layout)
            job.objective.evaluate(job.model, to_device(batch, job.device))
    machine.synchronize(job.device)
    return (time.perf_counter() - started) * float(step.lengths.sum() / part.lengths.sum())
