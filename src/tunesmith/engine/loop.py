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
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch

from tunesmith.data.encoded import Encoded
from tunesmith.data.pack import to_device
from tunesmith.engine import batching, distributed, optim
from tunesmith.engine.batching import Plan
from tunesmith.engine.config import TrainConfig
from tunesmith.errors import Interrupted, NonFiniteError
from tunesmith.models import kernels
from tunesmith.models.noise import RowNoise
from tunesmith.objectives import Batch, Objective

TRIM_STEPS = 8
"""Steps between two returns of freed memory: rare enough to cost nothing, often enough that holes do not add up."""


@dataclass
class Progression:
    """Where a run stands: all of it is in a checkpoint. ``window`` sums what the next log line will average."""

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    window: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Micro:
    """Rows that go through the network together: their ``places`` within the step, their ``lengths`` in tokens, their batch."""

    places: list[int]
    lengths: list[int]
    batch: Batch


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
    masters: optim.Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    plan: Plan
    config: TrainConfig
    packed: bool
    device: torch.device
    noise: RowNoise | None
    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Progression], float | None]
    save: Callable[[Progression], None]
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
    planned = (_step(job, number) for number in range(at.step + 1, plan.steps + 1))
    with signals() as stop:
        for step in job.objective.batches(job.model, planned):
            started = time.perf_counter()
            record = train_step(job, step)
            job.seconds += time.perf_counter() - started
            at.step += 1
            _account(job, at, record, time.perf_counter() - started)
            if at.step % TRIM_STEPS == 0:
                kernels.return_freed_memory()
            last = at.step == plan.steps
            if batching.due(config.logging_steps, at.step, plan.steps, plan.steps_per_epoch) or last:
                _log(job, at, record)
            verdict = None
            if last or batching.due(config.eval_steps, at.step, plan.steps, plan.steps_per_epoch):
                verdict = _judge(job, at, job.evaluate(at))
            stopping = distributed.same(stop[0] if stop else None)
            if last or verdict or stopping or batching.due(config.save_steps, at.step, plan.steps, plan.steps_per_epoch):
                job.save(at)
                saved = at.step
            if verdict:
                return verdict
            if stopping and not last:
                raise Interrupted(f"stopped by {stopping} after step {at.step}; a checkpoint was saved (step {saved})")
    return None


def train_step(job: Job, step: Step) -> dict[str, Any]:
    """One optimiser step: forward and backward over its micro-batches, one division, check, clip, update.

    Returns loss, units and tokens summed over all processes, grad_norm, learning_rate, and the means of the objective's metrics.
    """
    job.model.train()
    units, tokens = (sum(int(job.objective.count(micro.batch)) for micro in step.micro), sum(sum(m.lengths) for m in step.micro))
    total, tokens_of_all = distributed.add(float(units), float(tokens))
    losses: list[torch.Tensor] = []
    sums: dict[str, list[float]] = {}
    for micro in step.micro:
        _tell_noise(job, step.number, micro)
        loss, metrics = job.objective.loss(job.model, to_device(micro.batch, job.device))
        (loss / total).backward()
        losses.append(loss.detach())
        for name, (value, count) in metrics.items():
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + float(value), pair[1] + float(count)
    (loss_sum,) = distributed.add(float(sum(losses)) if losses else 0.0)
    everywhere = distributed.gather([sums])
    norm = float(optim.gather_and_clip(job.masters, job.config.max_grad_norm))
    if not (math.isfinite(loss_sum) and math.isfinite(norm)):
        _refuse(job, step, loss_sum / total, norm)
    learning_rate = job.schedule.get_last_lr()[0]
    job.optimizer.step()
    job.masters.publish(job.plan.seed, step.number)
    job.masters.clear()
    if not _waits_for_metric(job.schedule):
        job.schedule.step()
    names = {name for one in everywhere for name in one}
    metrics = {
        name: tuple(sum(one.get(name, [0.0, 0.0])[part] for one in everywhere) for part in (0, 1)) for name in sorted(names)
    }
    figures = {name: value / count for name, (value, count) in metrics.items() if count}
    return {
        "loss": loss_sum,
        "units": total,
        "tokens": tokens_of_all,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        **figures,
    }


def evaluate(
    model: Any, objective: Objective, data: Encoded, packed: bool, budget: int, device: torch.device
) -> dict[str, float]:
    """The objective's figures over all of ``data``, the same for any ``budget`` and any number of processes."""
    model.eval()
    order = np.argsort(-data.lengths, kind="stable")
    state = distributed.state()
    mine = order[state.process_index :: state.num_processes]
    records = []
    with torch.no_grad():
        for group in batching.micro_batches([int(data.lengths[row]) for row in mine], budget, packed):
            batch = objective.collate([data[int(mine[place])] for place in group], packed)
            records.append(objective.evaluate(model, to_device(batch, device)))
    return objective.summarise(distributed.gather(records))


def _step(job: Job, number: int) -> Step:
    """The micro-batches of optimiser step ``number`` that fall to this process."""
    state = distributed.state()
    rows = job.plan.rows(number)
    mine = list(range(len(rows)))[state.process_index :: state.num_processes]
    lengths = [int(job.plan.data.lengths[rows[place]]) for place in mine]
    micro = []
    for group in batching.micro_batches(lengths, job.config.micro_batch_tokens, job.packed):
        places = [mine[index] for index in group]
        micro.append(_micro(job, rows, places))
    return Step(number, rows, micro)


def _micro(job: Job, rows: np.ndarray, places: list[int]) -> Micro:
    examples = [job.plan.data[int(rows[place])] for place in places]
    return Micro(places, [int(job.plan.data.lengths[rows[p]]) for p in places], job.objective.collate(examples, job.packed))


def _tell_noise(job: Job, step: int, micro: Micro) -> None:
    if job.noise is not None:
        job.noise.step, job.noise.rows, job.noise.lengths, job.noise.packed = step, micro.places, micro.lengths, job.packed


def _waits_for_metric(schedule: Any) -> bool:
    return isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _refuse(job: Job, step: Step, loss: float, norm: float) -> None:
    """Name the rows whose loss is not finite on its own (all rows of the step when each is finite), and stop."""
    job.masters.clear()
    guilty = []
    with torch.no_grad():
        for place, row in enumerate(step.rows):
            micro = _micro(job, step.rows, [place])
            _tell_noise(job, step.number, micro)
            alone, _ = job.objective.loss(job.model, to_device(micro.batch, job.device))
            if not math.isfinite(float(alone)):
                guilty.append(int(row))
    names = [job.plan.data.where(row) for row in guilty or [int(row) for row in step.rows]]
    job.log({"kind": "stop", "step": step.number, "loss": loss, "grad_norm": norm, "rows": names})
    raise NonFiniteError(
        f"step {step.number}: the loss is {loss:.4g} and the norm of the gradient {norm:.4g}; no update was applied.\n"
        f"  {'Rows' if guilty else 'Rows of the step (each alone has a finite loss)'}: {', '.join(names)}\n"
        "  Lower train.learning_rate, or look at these rows with `tunesmith data preview`; "
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


def _log(job: Job, at: Progression, record: dict[str, Any]) -> None:
    window, at.window = at.window, {}
    extra = {k: v for k, v in record.items() if k not in ("loss", "units", "tokens", "grad_norm", "learning_rate")}
    job.log(
        {
            "kind": "train",
            "step": at.step,
            "epoch": round(job.plan.epoch(at.step), 6),
            "loss": window["loss"] / window["units"],
            "learning_rate": record["learning_rate"],
            "grad_norm": record["grad_norm"],
            **extra,
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
    if _waits_for_metric(job.schedule):
        job.schedule.step(figure)
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
        signal.signal(number, before[number])

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
