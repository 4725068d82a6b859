"""The training loop: the only backward in the codebase.

A source yields optimiser steps. The loop splits each into micro-batches under ``micro_batch_tokens``, sums losses and counts
over all of them and over all processes, and divides once. So the update does not depend on the split.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.data.batch.pack import Layout, to_device
from tunesmith.data.batch.step import Micro, Source, Step
from tunesmith.errors import Interrupted, NonFiniteError, OutOfMemoryError
from tunesmith.models.fast import kernels
from tunesmith.models.heads.noise import RowNoise
from tunesmith.objectives import Objective
from tunesmith.train import distributed, machine, metric_sums
from tunesmith.train.metric_sums import MetricSums
from tunesmith.train.train_config import TrainConfig, due
from tunesmith.train.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIM_STEPS = 8
"""Steps between two returns of freed memory: rare enough to cost nothing, often enough that holes do not add up."""


@dataclass
class Progression:
    """Where a run stands: all of it is in a checkpoint. ``window`` sums what the next log line will average, ``metrics`` too."""

    step: int = 0
    micro_batch_tokens: int = 0
    """The budget in force (0 = not chosen yet): found by measuring, or lowered when memory ran out."""
    tokens: int = 0
    supervised: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    window: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Of the same steps: {metric of the objective: [sum, count]}, as a checkpoint keeps it; see ``Job.sums``."""


@dataclass
class Job:
    """What the loop works on. ``save``, ``evaluate`` and ``log`` are given by the run; the loop decides when."""

    model: PreTrainedModel
    objective: Objective
    update: Update
    source: Source
    config: TrainConfig
    layout: Layout
    budget: int
    device: torch.device
    noise: RowNoise | None
    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Progression], float | None]
    save: Callable[[Progression], None]
    wants: Callable[[], tuple[str | None, str | None]] = lambda: (None, None)
    """Asked after each step: (why to end here, why to stop as a signal does); see ``train.callbacks``."""
    sums: MetricSums = field(default_factory=MetricSums)
    """Metrics of the objective since the last log, on the device."""
    seconds: float = 0.0
    """Time spent in optimiser steps."""
    trained_tokens: int = 0
    """Tokens of those steps, since this process began."""


def fit(job: Job, at: Progression) -> str | None:
    """Train from ``at.step`` to the end of the plan. Returns why it stopped early, or None.

    Raises NonFiniteError before an update that is not finite, and Interrupted after a signal, with a checkpoint saved.
    """
    plan, config = job.source.plan, job.config
    saved = at.step
    job.sums.load(at.metrics, job.device)
    with signals() as stop:
        steps = job.source.steps(at.step + 1)
        while (taken := _take(job, at, steps)) is not None:
            before, record = taken
            if at.step % TRIM_STEPS == 0:
                kernels.return_freed_memory()
            last = at.step == plan.steps

            def falls_due(every: float | str | None, before: int = before, now: int = at.step) -> bool:
                return any(
                    due(every, one, plan.steps, plan.steps_per_epoch) for one in range(before + 1, now + 1)
                )

            if falls_due(config.logging_steps) or last:
                _log(job, at, record)
            verdict = None
            evaluated = last or falls_due(config.eval_steps)
            if evaluated:
                verdict = _judge(job, at, job.evaluate(at))
            ending, failing = job.wants()
            ending, stopping = distributed.same((ending, stop[0] if stop else failing))
            if ending and not evaluated:  # so that its model is judged, and kept if it is the best
                job.evaluate(at)
            verdict = verdict or ending
            if last or verdict or stopping or falls_due(config.save_steps):
                _save(job, at)
                saved = at.step
                verdict = verdict or distributed.same(
                    job.wants()[0]
                )  # saving may be what the user waited for
            if verdict:
                return verdict
            if stopping and not last:
                raise Interrupted(
                    f"stopped by {stopping} after step {at.step}; a checkpoint was saved (step {saved}): go on with --resume"
                )
    if at.step < plan.steps:  # the source skipped the rest of its plan
        at.step = plan.steps
        verdict = _judge(job, at, job.evaluate(at))
        _save(job, at)
        return verdict
    return None


def _take(job: Job, at: Progression, steps: Iterator[Step]) -> tuple[int, dict[str, Any]] | None:
    """Take the next step and add it to the open logging window; what the source does for a step is part of its seconds.
    Returns (the step that ``at`` stood at before, the record), or None at the end."""
    started = time.perf_counter()
    step = next(steps, None)
    if step is None:
        return None
    before = at.step
    job.update.skip(step.number - 1 - before)
    record = train_step(job, step)
    at.step = step.number
    seconds = time.perf_counter() - started
    job.seconds += seconds
    at.micro_batch_tokens = job.budget
    _account(job, at, record, seconds)
    return before, record


def train_step(job: Job, step: Step) -> dict[str, Any]:
    """One optimiser step: forward and backward over its micro-batches, one division, check, clip, update.

    Returns loss, units and tokens summed over all processes, grad_norm, learning_rate (and those of groups with their own),
    and the update's other figures. The host waits for the device once, for loss and norm; metrics go to ``job.sums``.
    """
    job.model.train()
    state, masters = distributed.state(), job.update.masters
    micro = step.micro_batches(
        job.budget, job.layout, state.process_index, state.num_processes, even=masters.in_step
    )
    busy = [one for one in micro if not one.idle]
    units, tokens = sum(job.objective.count(one.batch) for one in busy), sum(sum(one.lengths) for one in busy)
    total, tokens_of_all = distributed.add(float(units), float(tokens))
    before = job.budget
    loss_here, sums = accumulate(job, step, micro, total)
    if job.budget < before:
        job.log({"kind": "memory", "step": step.number, "micro_batch_tokens": job.budget, "before": before})
    loss_of_all = job.sums.add(loss_here, sums)
    loss_sum, norm = job.update.norm(loss_of_all)
    if not job.update.may_go_on(loss_sum, norm):
        _refuse(job, step, loss_sum / total, norm)
    rates = job.update.learning_rates
    job.update.apply(step.number)
    return {
        "loss": loss_sum,
        "units": total,
        "tokens": tokens_of_all,
        "grad_norm": norm,
        **rates,
        **job.update.figures(),
    }


Sums = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Sum of the loss, and metric -> float64 (2,): [sum, count]; on the device."""

Backward = Callable[[torch.Tensor, bool], None]


def accumulate(
    job: Job, step: Step, micro: list[Micro], total: float, backward: Backward | None = None
) -> Sums:
    """Forward and backward of every micro-batch of this process, each loss divided by ``total``. ``backward``: of the update.

    A micro-batch that does not fit into memory is halved and the step begun anew, with the same result; all later ones are kept
    as small. Raises OutOfMemoryError when a single row does not fit, or when other processes wait for this backward.
    """
    while isinstance(
        outcome := _try_to_accumulate(job, step, micro, total, backward or job.update.backward), int
    ):
        if backward is None and job.update.masters.in_step:
            raise OutOfMemoryError(
                f"step {step.number}: a micro-batch of {micro[outcome].tokens} tokens needs more memory than is left. "
                "With DeepSpeed it cannot be halved midway, because the other processes wait for it.\n"
                f"  Set train.micro_batch_tokens below {job.budget}; then go on with --resume."
            )
        job.update.drop()
        machine.release_memory(job.device)
        micro = _halved(job, step, micro, outcome)
    return outcome


def _try_to_accumulate(
    job: Job, step: Step, micro: list[Micro], total: float, backward: Backward
) -> Sums | int:
    """The sums, or the number of the micro-batch that did not fit (returned, not raised: a traceback holds tensors)."""
    losses: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    for number, one in enumerate(micro):
        try:
            _tell_noise(job, step.number, one)
            loss, metrics = job.objective.loss(job.model, to_device(one.batch, job.device))
            backward(loss * 0.0 if one.idle else loss / total, number + 1 == len(micro))
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            return number
        if one.idle:
            continue
        losses.append(loss.detach())
        for name, pair in metrics.items():
            exact = metric_sums.as_pair(*pair, job.device)
            sums[name] = sums[name] + exact if name in sums else exact
    return sum(losses, torch.zeros((), device=job.device)), sums


def _halved(job: Job, step: Step, micro: list[Micro], number: int) -> list[Micro]:
    """The micro-batches with number ``number`` in two; from now on none is larger than the larger half."""
    places = micro[number].places
    if len(places) == 1:
        raise OutOfMemoryError(
            f"step {step.number}: one row alone ({step.name(places[0])}, {micro[number].lengths[0]} tokens) needs more memory "
            "than the machine has left.\n"
            "  Set train.gradient_checkpointing=true, lower train.max_length, or take a smaller model; "
            "then go on with --resume or start again."
        )
    halves = [
        step.micro(part, job.layout) for part in (places[: len(places) // 2], places[len(places) // 2 :])
    ]
    job.budget = min(job.budget, max(half.tokens for half in halves))
    return [*micro[:number], *halves, *micro[number + 1 :]]


def rehearse(job: Job, step: Step, places: list[int]) -> None:
    """Forward and backward of one micro-batch, its gradients forgotten: what does not fit shows before anything is done."""
    job.model.train()
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        accumulate(job, step, [step.micro(places, job.layout)], 1.0, job.update.rehearse)
    job.update.drop()


def _tell_noise(job: Job, step: int, micro: Micro) -> None:
    if job.noise is not None:
        job.noise.step, job.noise.rows, job.noise.lengths = step, micro.places, micro.lengths
        job.noise.packed = job.layout.packed


def _refuse(job: Job, step: Step, loss: float, norm: float) -> None:
    """Name the rows whose loss is not finite on its own (all rows of the step when each is finite), and stop."""
    job.update.drop()
    guilty = []
    with torch.no_grad():
        for place in range(len(step)):
            one = step.micro([place], job.layout)
            _tell_noise(job, step.number, one)
            alone, _ = job.objective.loss(job.model, to_device(one.batch, job.device))
            if not math.isfinite(float(alone)):
                guilty.append(place)
    names = step.names(guilty or None)
    job.log({"kind": "stop", "step": step.number, "loss": loss, "grad_norm": norm, "rows": names})
    raise NonFiniteError(
        f"step {step.number}: the loss is {loss:.4g} and the norm of the gradient {norm:.4g}; no update was applied.\n"
        f"  {'Rows' if guilty else 'Rows of the step (each alone has a finite loss)'}: {', '.join(names)}\n"
        f"  Lower train.learning_rate, {job.update.advice}or look at these rows with `tunesmith data preview`; "
        "then go on from the last checkpoint with --resume."
    )


def _account(job: Job, at: Progression, record: dict[str, Any], seconds: float) -> None:
    at.tokens += int(record["tokens"])
    at.supervised += int(record["units"])
    job.trained_tokens += int(record["tokens"])
    window = at.window
    for name in ("loss", "units", "tokens"):
        window[name] = window.get(name, 0.0) + record[name]
    window["seconds"] = window.get("seconds", 0.0) + seconds


def _save(job: Job, at: Progression) -> None:
    at.metrics = job.sums.plain()
    job.save(at)


def _log(job: Job, at: Progression, record: dict[str, Any]) -> None:
    window, at.window = at.window, {}
    metrics = job.sums.plain()
    job.sums.clear()
    extra = {
        k: v for k, v in record.items() if k not in ("loss", "units", "tokens", "grad_norm", "learning_rate")
    }
    job.log(
        {
            "kind": "train",
            "step": at.step,
            "epoch": round(job.source.plan.epoch(at.step), 6),
            "loss": window["loss"] / window["units"],
            "learning_rate": record["learning_rate"],
            "grad_norm": record["grad_norm"],
            **extra,
            "update_ratio": job.update.ratio.value,
            **{name: value / count for name, (value, count) in metrics.items() if count},
            "tokens": at.tokens,
            "supervised_tokens": at.supervised,
            "seconds": window["seconds"],
            "tokens_per_second": window["tokens"] / window["seconds"],
        }
    )


def _judge(job: Job, at: Progression, figure: float | None) -> str | None:
    """Keep count of the best; the reason to stop early, or None. ``job.evaluate`` has saved the model if it was the best yet."""
    if figure is None:
        return None
    job.update.judge(figure)
    patience = job.config.early_stopping_patience
    if patience and at.without_improvement >= patience:
        return f"no improvement in {at.without_improvement} evaluations; the best was {at.best:.4f} at step {at.best_step}"
    return None


def improved(at: Progression, figure: float, direction: str, threshold: float) -> bool:
    """Note an evaluation's figure; whether it is the best so far. NaN never is. Progress is a gain above ``threshold``."""
    gain = math.inf if at.best is None else (at.best - figure if direction == "min" else figure - at.best)
    if math.isnan(figure):
        gain = -math.inf
    at.without_improvement = 0 if gain > threshold else at.without_improvement + 1
    if gain > 0:
        at.best, at.best_step = figure, at.step
    return gain > 0


@contextmanager
def signals() -> Iterator[list[str]]:
    """SIGINT and SIGTERM fill the list that is yielded; a second one ends the process at once, as if nobody had listened."""
    received: list[str] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for listened, handler in before.items():
            signal.signal(listened, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            break
    try:
        yield received
    finally:
        for listened, handler in before.items():
            signal.signal(listened, handler)
