"""The training loop: the only backward in the codebase.

One optimiser step takes the rows of ``batch_size``, cuts them into micro-batches under ``micro_batch_tokens``, sums losses and
counts over all of them and over all processes, and divides once. So the update does not depend on the split.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.errors import Interrupted, NonFiniteError, OutOfMemoryError
from tunesmith.models.fast import kernels
from tunesmith.models.heads.noise import RowNoise
from tunesmith.objectives import Batch, Objective
from tunesmith.train import batching, distributed, machine
from tunesmith.train.batching import Plan
from tunesmith.train.config import TrainConfig
from tunesmith.train.update import Update

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
    """Of the same steps: {metric of the objective: [sum, count]}."""


@dataclass(frozen=True)
class Micro:
    """Rows that go through the network together: their ``places`` within the step, their ``lengths`` in tokens, their batch.

    An ``idle`` one counts nothing: its process has no rows left while others have, and they need it in their collectives.
    """

    places: list[int]
    lengths: list[int]
    batch: Batch
    idle: bool = False


@dataclass(frozen=True)
class Step:
    """One optimiser step of this process; ``rows`` are the examples of all processes."""

    number: int
    rows: np.ndarray
    micro: list[Micro]


@dataclass
class Job:
    """What the loop works on. ``save``, ``evaluate`` and ``log`` are given by the run; the loop decides when."""

    model: Any
    objective: Objective
    update: Update
    plan: Plan
    config: TrainConfig
    packed: bool
    budget: int
    device: torch.device
    noise: RowNoise | None
    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Progression], float | None]
    save: Callable[[Progression], None]
    wants: Callable[[], tuple[str | None, str | None]] = lambda: (None, None)
    """Asked after each step: (why to end here, why to stop as a signal does); see ``train.hooks``."""
    seconds: float = 0.0
    """Time spent in optimiser steps."""
    trained_tokens: int = 0
    """Tokens of those steps, since this process began."""


def fit(job: Job, at: Progression) -> str | None:
    """Train from ``at.step`` to the end of the plan. Returns why it stopped early, or None.

    Raises NonFiniteError before an update that is not finite, and Interrupted after a signal, with a checkpoint saved.
    """
    plan, config = job.plan, job.config
    saved = at.step
    steps = (planned(job, number) for number in range(at.step + 1, plan.steps + 1))
    with signals() as stop:
        for step in job.objective.batches(job.model, steps):
            started = time.perf_counter()
            record = train_step(job, step)
            job.seconds += time.perf_counter() - started
            at.step += 1
            at.micro_batch_tokens = job.budget
            _account(job, at, record, time.perf_counter() - started)
            if at.step % TRIM_STEPS == 0:
                kernels.return_freed_memory()
            last = at.step == plan.steps
            if batching.due(config.logging_steps, at.step, plan.steps, plan.steps_per_epoch) or last:
                _log(job, at, record)
            verdict = None
            evaluated = last or batching.due(config.eval_steps, at.step, plan.steps, plan.steps_per_epoch)
            if evaluated:
                verdict = _judge(job, at, job.evaluate(at))
            ending, failing = job.wants()
            ending, stopping = distributed.same((ending, stop[0] if stop else failing))
            if ending and not evaluated:  # so that its model is judged, and kept if it is the best
                job.evaluate(at)
            verdict = verdict or ending
            if last or verdict or stopping or batching.due(config.save_steps, at.step, plan.steps, plan.steps_per_epoch):
                job.save(at)
                saved = at.step
                verdict = verdict or distributed.same(job.wants()[0])  # saving may be what the user waited for
            if verdict:
                return verdict
            if stopping and not last:
                raise Interrupted(
                    f"stopped by {stopping} after step {at.step}; a checkpoint was saved (step {saved}): go on with --resume"
                )
    return None


def train_step(job: Job, step: Step) -> dict[str, Any]:
    """One optimiser step: forward and backward over its micro-batches, one division, check, clip, update.

    Returns loss, units and tokens summed over all processes, grad_norm, learning_rate (and those of groups with their own),
    update_ratio (norm of the update over norm of the weights), the update's other figures, and ``metrics``, the objective's:
    {name: [sum, count]}.
    """
    job.model.train()
    busy = [one for one in step.micro if not one.idle]
    units, tokens = sum(int(job.objective.count(one.batch)) for one in busy), sum(sum(one.lengths) for one in busy)
    total, tokens_of_all = distributed.add(float(units), float(tokens))
    before = job.budget
    loss_here, sums = accumulate(job, step, total)
    if job.budget < before:
        job.log({"kind": "memory", "step": step.number, "micro_batch_tokens": job.budget, "before": before})
    (loss_sum,) = distributed.add(loss_here)
    everywhere = distributed.gather([sums])
    norm = job.update.norm()
    if not job.update.may_go_on(loss_sum, norm):
        _refuse(job, step, loss_sum / total, norm)
    rates = job.update.learning_rates
    job.update.apply(step.number)
    names = {name for one in everywhere for name in one}
    metrics = {name: [sum(one.get(name, [0.0, 0.0])[part] for one in everywhere) for part in (0, 1)] for name in sorted(names)}
    return {
        "loss": loss_sum,
        "units": total,
        "tokens": tokens_of_all,
        "grad_norm": norm,
        **rates,
        "update_ratio": job.update.ratio.value,
        **job.update.figures(),
        "metrics": metrics,
    }


Sums = tuple[float, dict[str, list[float]]]
"""Sum of the loss, and {metric: [sum, count]}."""


Backward = Callable[[torch.Tensor, bool], None]


def accumulate(job: Job, step: Step, total: float, backward: Backward | None = None) -> Sums:
    """Forward and backward of every micro-batch of this process, each loss divided by ``total``. ``backward``: of the update.

    A micro-batch that does not fit into memory is halved and the step begun anew, with the same result; all later ones are kept
    as small. Raises OutOfMemoryError when a single row does not fit, or when other processes wait for this backward.
    """
    while isinstance(outcome := _try_to_accumulate(job, step, total, backward or job.update.backward), int):
        if backward is None and job.update.masters.in_step:
            most = taken(job, step.rows, step.micro[outcome])
            raise OutOfMemoryError(
                f"step {step.number}: a micro-batch of {most} tokens needs more memory than is left. "
                "With DeepSpeed it cannot be halved midway, because the other processes wait for it.\n"
                f"  Set train.micro_batch_tokens below {job.budget}; then go on with --resume."
            )
        job.update.drop()
        machine.release_memory(job.device)
        step = _halved(job, step, outcome)
    return outcome


def _try_to_accumulate(job: Job, step: Step, total: float, backward: Backward) -> Sums | int:
    """The sums, or the number of the micro-batch that did not fit (returned, not raised: a traceback holds tensors)."""
    losses: list[torch.Tensor] = []
    sums: dict[str, list[float]] = {}
    for number, one in enumerate(step.micro):
        try:
            _tell_noise(job, step.number, one)
            loss, metrics = job.objective.loss(job.model, to_device(one.batch, job.device))
            backward(loss * 0.0 if one.idle else loss / total, number + 1 == len(step.micro))
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            return number
        if one.idle:
            continue
        losses.append(loss.detach())
        for name, (value, count) in metrics.items():
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + float(value), pair[1] + float(count)
    return float(sum(losses)) if losses else 0.0, sums


def _halved(job: Job, step: Step, number: int) -> Step:
    """The step with micro-batch ``number`` in two; from now on no micro-batch is larger than the larger half."""
    places = step.micro[number].places
    if len(places) == 1:
        row, length = job.plan.data.where(int(step.rows[places[0]])), step.micro[number].lengths[0]
        raise OutOfMemoryError(
            f"step {step.number}: one row alone ({row}, {length} tokens) needs more memory than the machine has left.\n"
            "  Set train.gradient_checkpointing=true, lower train.max_length, or take a smaller model; "
            "then go on with --resume or start again."
        )
    halves = [micro(job, step.rows, part) for part in (places[: len(places) // 2], places[len(places) // 2 :])]
    job.budget = min(job.budget, max(taken(job, step.rows, half) for half in halves))
    return Step(step.number, step.rows, [*step.micro[:number], *halves, *step.micro[number + 1 :]])


def rehearse(job: Job, step: int, places: list[int]) -> None:
    """Forward and backward of one micro-batch, its gradients forgotten: what does not fit shows before anything is done."""
    job.model.train()
    rows = job.plan.rows(step)
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        accumulate(job, Step(step, rows, [micro(job, rows, places)]), 1.0, job.update.rehearse)
    job.update.drop()


def planned(job: Job, number: int) -> Step:
    """The micro-batches of optimiser step ``number`` that fall to this process."""
    state = distributed.state()
    groups = batching.split(
        job.plan, number, job.budget, job.packed, state.process_index, state.num_processes, job.objective.shared
    )
    rows = job.plan.rows(number)
    made = [micro(job, rows, places) for places in groups]
    if job.update.masters.in_step:
        most = batching.most_micro_batches(job.plan, number, job.budget, job.packed, state.num_processes, job.objective.shared)
        shortest = int(np.argmin(job.plan.data.lengths[rows]))
        made += [replace(micro(job, rows, [shortest]), idle=True) for _ in range(most - len(made))]
    return Step(number, rows, made)


def micro(job: Job, rows: np.ndarray, places: list[int]) -> Micro:
    """Some rows of a step as one micro-batch."""
    examples = [job.plan.data[int(rows[place])] for place in places]
    return Micro(places, [int(job.plan.data.lengths[rows[p]]) for p in places], job.objective.collate(examples, job.packed))


def taken(job: Job, rows: np.ndarray, micro: Micro) -> int:
    """Tokens of a micro-batch as the network sees it, padding counted, and a prompt as often as it is there."""
    return batching.tokens(job.plan.data, rows[micro.places], job.packed, job.objective.shared)


def _tell_noise(job: Job, step: int, micro: Micro) -> None:
    if job.noise is not None:
        job.noise.step, job.noise.rows, job.noise.lengths, job.noise.packed = step, micro.places, micro.lengths, job.packed


def _refuse(job: Job, step: Step, loss: float, norm: float) -> None:
    """Name the rows whose loss is not finite on its own (all rows of the step when each is finite), and stop."""
    job.update.drop()
    guilty = []
    with torch.no_grad():
        for place, row in enumerate(step.rows):
            one = micro(job, step.rows, [place])
            _tell_noise(job, step.number, one)
            alone, _ = job.objective.loss(job.model, to_device(one.batch, job.device))
            if not math.isfinite(float(alone)):
                guilty.append(int(row))
    names = [job.plan.data.where(row) for row in guilty or [int(row) for row in step.rows]]
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
    for name, (value, count) in record["metrics"].items():
        before = at.metrics.get(name, [0.0, 0.0])
        at.metrics[name] = [before[0] + value, before[1] + count]


def _log(job: Job, at: Progression, record: dict[str, Any]) -> None:
    window, at.window = at.window, {}
    metrics, at.metrics = at.metrics, {}
    extra = {k: v for k, v in record.items() if k not in ("loss", "units", "tokens", "grad_norm", "learning_rate", "metrics")}
    job.log(
        {
            "kind": "train",
            "step": at.step,
            "epoch": round(job.plan.epoch(at.step), 6),
            "loss": window["loss"] / window["units"],
            "learning_rate": record["learning_rate"],
            "grad_norm": record["grad_norm"],
            **extra,
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
