"""The training loop, with the only backward pass of the codebase.

A source yields optimiser steps. The loop splits each step into micro-batches under ``micro_batch_tokens``,
and divides every loss by the loss units of the whole step, summed over all processes. So the update does not
depend on the split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tunesmith import machine
from tunesmith.data.batch import lane_groups
from tunesmith.data.batch.pack import Layout, to_device
from tunesmith.data.batch.step import Micro, Source, Step
from tunesmith.errors import Interrupted, NonFiniteError, OutOfMemoryError, RewardError
from tunesmith.json_types import JsonObject
from tunesmith.models.fast import kernels
from tunesmith.models.heads.noise import RowNoise
from tunesmith.models.load import finite
from tunesmith.objectives import Objective
from tunesmith.train import distributed, lane_gradients, metric_sums
from tunesmith.train.metric_sums import MetricSums, Sums
from tunesmith.train.progression import Progression
from tunesmith.train.stop_signals import catch_signals
from tunesmith.train.train_config import TrainConfig, due
from tunesmith.train.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIM_STEPS = 8
"""Steps between two calls that return freed memory to the system: rare enough to cost nothing."""


@dataclass
class Job:
    """Everything the loop works on. The run provides the functions; the loop decides when to call them."""

    model: PreTrainedModel
    objective: Objective
    update: Update
    source: Source
    config: TrainConfig
    layout: Layout
    budget: int
    """Maximum tokens of a micro-batch."""
    device: torch.device
    noise: RowNoise | None
    log: Callable[[JsonObject], None]
    evaluate: Callable[[Progression], float | None]
    save: Callable[[Progression], None]
    stop_requests: Callable[[], tuple[str | None, str | None]] = lambda: (None, None)
    """Returns (a reason to end the run, a reason to stop as after a signal); see ``train.callbacks``."""
    sums: MetricSums = field(default_factory=MetricSums)
    """Metrics of the objective since the last log, on the device."""
    seconds: float = 0.0
    """Time that this process spent in optimiser steps."""
    trained_tokens: int = 0
    """Tokens of those steps."""


def fit(job: Job, position: Progression) -> str | None:
    """Train from ``position.step`` to the end of the plan. Returns why training stopped early, or None.

    Raises NonFiniteError before an update that is not finite, and Interrupted and RewardError after a save.
    """
    plan = job.source.plan
    saved = position.step
    job.sums.load(position.metrics, job.device)
    with catch_signals() as received, _saved_before_a_reward_error(job, position):
        if position.evaluation_due:
            verdict = _evaluate(job, position)
            _save(job, position)
            if verdict:
                return verdict
        steps = job.source.steps(position.step + 1)
        while True:
            started = time.perf_counter()  # before next(): the source may sample answers there
            if (step := next(steps, None)) is None:
                break
            made = time.perf_counter()
            before = position.step
            job.update.skip(step.number - 1 - before)
            record = train_step(job, step)
            _account(job, position, step, record, time.perf_counter() - started, made - started)
            log_due, eval_due, save_due = _due(job, before, position.step)
            if position.step % TRIM_STEPS == 0:
                kernels.return_freed_memory()
            if log_due:
                _log(job, position, record)
            verdict = None
            if eval_due:
                verdict = _evaluate(job, position)
            ending, failing = job.stop_requests()
            ending, stopping = distributed.broadcast((ending, received[0] if received else failing))
            if ending and not eval_due:  # the last model may be the best
                job.evaluate(position)
            verdict = verdict or ending
            if save_due or verdict or stopping:
                _save(job, position)
                saved = position.step
                # on_save may have requested the end
                verdict = verdict or distributed.broadcast(job.stop_requests()[0])
            if verdict:
                return verdict
            if stopping and position.step < plan.steps:
                raise Interrupted(
                    f"stopped by {stopping} after step {position.step}; a checkpoint of step {saved} was saved.\n"
                    "  Continue with --resume."
                )
    if position.step < plan.steps:  # the source skipped the rest of its plan
        position.step = plan.steps
        verdict = _evaluate(job, position)
        _save(job, position)
        return verdict
    return None


@contextmanager
def _saved_before_a_reward_error(job: Job, position: Progression) -> Iterator[None]:
    """Save before a RewardError is raised: the answers to be scored are part of the source's state."""
    try:
        yield
    except RewardError as error:
        _save(job, position)
        kept = "The evaluation" if position.evaluation_due else "The answers are saved: their scoring"
        error.args = (
            f"{error}\n  {kept} is repeated with --resume. Correct the reward first: else it fails.",
        )
        raise


def _due(job: Job, before: int, now: int) -> list[bool]:
    """Return whether (a log, an evaluation, a checkpoint) is due at a step in (before, now].

    All are due at the last step.
    """
    config, plan = job.config, job.source.plan
    passed = range(before + 1, now + 1)  # a source may skip steps of its plan
    return [
        now == plan.steps or any(due(every, step, plan.steps, plan.steps_per_epoch) for step in passed)
        for every in (config.logging_steps, config.eval_steps, config.save_steps)
    ]


def _account(
    job: Job,
    position: Progression,
    step: Step,
    record: Mapping[str, float],
    seconds: float,
    source_seconds: float,
) -> None:
    """Add a step and its ``seconds`` to the position and to the open logging window.

    ``source_seconds``: the part of them in which the source made the step."""
    position.step = step.number
    job.seconds += seconds
    job.trained_tokens += int(record["tokens"])
    position.micro_batch_tokens = job.budget
    position.tokens += int(record["tokens"])
    position.supervised += int(record["units"])
    window = position.window
    for name in ("loss", "units", "tokens"):
        window[name] = window.get(name, 0.0) + record[name]
    window["seconds"] = window.get("seconds", 0.0) + seconds
    if job.objective.traits.samples:
        window["update_seconds"] = window.get("update_seconds", 0.0) + seconds - source_seconds


def micro_batches(job: Job, step: Step) -> list[Micro]:
    """Split the examples of this process into micro-batches."""
    state = distributed.state()
    even = job.update.masters.in_step
    return step.micro_batches(job.budget, job.layout, state.process_index, state.num_processes, even)


def train_step(job: Job, step: Step) -> dict[str, float]:
    """Run one optimiser step: forward and backward over its micro-batches, check, clip, update.

    Returns loss, units and tokens summed over all processes, grad_norm, learning_rate (and the
    rate of each group that differs), and the figures of the update. The host waits for the device once, for loss and
    norm; metrics go to ``job.sums``.
    """
    job.model.train()
    micro = micro_batches(job, step)
    busy = [part for part in micro if not part.idle]
    units = sum(job.objective.count(part.batch) for part in busy)
    tokens = sum(sum(part.lengths) for part in busy)
    total, all_tokens = distributed.add(float(units), float(tokens))
    before = job.budget
    while isinstance(outcome := accumulation(job)(job, step, micro, total, job.update.backward), int):
        if job.update.masters.in_step:
            raise OutOfMemoryError(
                f"step {step.number}: a micro-batch of {micro[outcome].tokens} tokens needs more memory than is left. "
                "With DeepSpeed the loop cannot split it, because all processes run the same number of backward passes.\n"
                f"  Set train.micro_batch_tokens below {job.budget}, then continue with --resume."
            )
        micro = halve(job, step, micro, outcome)
    process_loss, sums = outcome
    if job.budget < before:
        job.log({"kind": "memory", "step": step.number, "micro_batch_tokens": job.budget, "before": before})
    loss_sum, norm = job.update.norm(job.sums.add(process_loss, sums))
    if not job.update.is_applicable(loss_sum, norm):
        _raise_non_finite(job, step, loss_sum / total, norm)
    rates = job.update.learning_rates
    job.update.apply(step.number)
    record = {"loss": loss_sum, "units": total, "tokens": all_tokens, "grad_norm": norm}
    return {**record, **rates, **job.update.figures()}


Backward = Callable[[torch.Tensor, bool, int | None], None]
"""(loss, whether it is the last of the step, turn) -> None."""


def accumulate(
    job: Job, step: Step, micro: list[Micro], total: float, backward: Backward, turn: int | None = None
) -> Sums | int:
    """Run forward and backward of every micro-batch of this process, each loss divided by ``total``.

    Returns the sums, or the number of the micro-batch that did not fit into memory: returned, not raised,
    because a traceback keeps tensors alive. ``halve`` splits that micro-batch for the next attempt, whose
    result is the same. ``turn``: see ``train.lane_gradients``.
    """
    losses: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    for number, part in enumerate(micro):
        try:
            _set_noise(job, step, part)
            loss, metrics = job.objective.loss(job.model, to_device(part.batch, job.device))
            backward(loss * 0.0 if part.idle else loss / total, number + 1 == len(micro), turn)
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            return number
        if part.idle:
            continue
        losses.append(loss.detach())
        for name, pair in metrics.items():
            exact = metric_sums.as_pair(*pair, job.device)
            sums[name] = sums[name] + exact if name in sums else exact
    return sum(losses, torch.zeros((), device=job.device)), sums


def accumulate_in_lanes(
    job: Job, step: Step, micro: list[Micro], total: float, backward: Backward
) -> Sums | int:
    """:func:`accumulate`, with the micro-batches that fit into ``job.budget`` together at the same time.

    ``halve`` is told the number of one that did not fit, as by ``accumulate``.
    """
    if len(micro) < 2:
        return accumulate(job, step, micro, total, backward)

    def run(number: int, turn: int) -> Sums | int:
        return accumulate(job, step, [micro[number]], total, backward, turn)

    return lane_gradients.sums(run, [part.tokens for part in micro], job.budget, job.layout.lanes)


def accumulation(job: Job) -> Callable[[Job, Step, list[Micro], float, Backward], Sums | int]:
    """Return :func:`accumulate`, or :func:`accumulate_in_lanes` where the layout has lanes."""
    return accumulate if job.layout.lanes == 1 else accumulate_in_lanes


def _set_noise(job: Job, step: Step, micro: Micro) -> None:
    if job.noise is not None:
        job.noise.step, job.noise.rows, job.noise.lengths = step.number, micro.places, micro.lengths
        job.noise.packed = job.layout.packed


def halve(job: Job, step: Step, micro: list[Micro], number: int) -> list[Micro]:
    """Discard the step's gradients and return its micro-batches, the one at index ``number`` split in two.

    Lowers ``job.budget`` to the larger half. One that ran with others at the same time is not split: all of
    them are grouped again, under half of their tokens. Raises OutOfMemoryError when the micro-batch is a single row.
    """
    job.update.clear_gradients()
    machine.release_memory(job.device)
    places, at_once = micro[number].places, job.layout.lanes
    tokens = [part.tokens for part in micro]
    if number >= lane_groups.count_alone(tokens, job.budget, at_once):
        job.budget = sum(tokens[number : number + at_once]) // 2
        return _regroup(job, step, [place for part in micro for place in part.places])
    if len(places) == 1:
        raise OutOfMemoryError(
            f"step {step.number}: one row alone ({step.name(places[0])}, {micro[number].lengths[0]} tokens) needs "
            "more memory than the machine has left.\n"
            "  Set train.gradient_checkpointing=true, lower train.max_length, or take a smaller model; "
            "then continue with --resume or start again."
        )
    middle = len(places) // 2
    halves = [step.micro(part, job.layout) for part in (places[:middle], places[middle:])]
    job.budget = min(job.budget, max(half.tokens for half in halves))
    if at_once > 1:
        return _regroup(job, step, [place for part in micro for place in part.places])
    return [*micro[:number], *halves, *micro[number + 1 :]]


def _regroup(job: Job, step: Step, places: list[int]) -> list[Micro]:
    """Return the micro-batches of ``places`` under ``job.budget``."""
    return [step.micro(part, job.layout) for part in step.groups(sorted(places), job.budget, job.layout)]


def rehearse(job: Job, step: Step, places: list[int]) -> None:
    """Run forward and backward of the micro-batches of ``places`` and discard their gradients, to see whether they fit.

    Without lanes ``places`` are one micro-batch."""
    job.model.train()
    with machine.fork_rng(job.device):
        micro = [step.micro(places, job.layout)] if job.layout.lanes == 1 else _regroup(job, step, places)
        while isinstance(outcome := accumulation(job)(job, step, micro, 1.0, job.update.rehearse), int):
            micro = halve(job, step, micro, outcome)
    job.update.clear_gradients()


def _raise_non_finite(job: Job, step: Step, loss: float, norm: float) -> None:
    """Raise NonFiniteError with the rows whose own loss is not finite, or with all rows of the step.

    If weights are not finite, the error names these weights instead, because no row's loss is finite then.
    """
    job.update.clear_gradients()
    weights = dict(job.model.named_parameters())
    if counts := finite.count_non_finite(weights):
        job.log(
            {"kind": "stop", "step": step.number, "loss": loss, "grad_norm": norm, "rows": step.names(None)}
        )
        raise NonFiniteError(
            f"step {step.number}: the loss is {loss:.4g}, because the weights are not finite: "
            f"{finite.describe(counts, weights)}.\n"
            "  Either the base model holds such values, or the update of the step before overflowed: lower "
            "train.learning_rate and start another run with --out DIR."
        )
    rows = []
    with torch.no_grad():
        for place in range(len(step)):
            row = step.micro([place], job.layout)
            _set_noise(job, step, row)
            row_loss, _ = job.objective.loss(job.model, to_device(row.batch, job.device))
            if not math.isfinite(float(row_loss)):
                rows.append(place)
    names = step.names(rows or None)
    job.log({"kind": "stop", "step": step.number, "loss": loss, "grad_norm": norm, "rows": names})
    raise NonFiniteError(
        f"step {step.number}: the loss is {loss:.4g} and the norm of the gradient {norm:.4g}; no update was applied.\n"
        f"  {'Rows' if rows else 'Rows of the step (each alone has a finite loss)'}: {', '.join(names)}\n"
        f"  Lower train.learning_rate, {job.update.advice}or look at these rows with `tunesmith data preview`; "
        "then start another run with --out DIR. What was saved before is kept."
    )


def _save(job: Job, position: Progression) -> None:
    position.metrics = job.sums.read()
    job.save(position)


def _log(job: Job, position: Progression, record: dict[str, float]) -> None:
    window, position.window = position.window, {}
    metrics = job.sums.read()
    job.sums.clear()
    of_window = ("loss", "units", "tokens")
    job.log(
        {
            "kind": "train",
            "step": position.step,
            "epoch": round(job.source.plan.epoch(position.step), 6),
            "loss": window["loss"] / window["units"],
            "learning_rate": record["learning_rate"],
            "grad_norm": record["grad_norm"],
            **{name: value for name, value in record.items() if name not in of_window},
            "update_ratio": job.update.ratio.value,
            **{name: value / count for name, (value, count) in metrics.items() if count},
            "tokens": position.tokens,
            "supervised_tokens": position.supervised,
            **metric_sums.speed(window),
        }
    )


def _evaluate(job: Job, position: Progression) -> str | None:
    """Evaluate, and report the figure to the schedule. Returns the reason to stop early, or None."""
    position.evaluation_due = True
    figure = job.evaluate(position)
    position.evaluation_due = False
    if figure is None:
        return None
    job.update.report_metric(figure)
    patience = job.config.early_stopping_patience
    if patience and position.without_improvement >= patience:
        count, best = position.without_improvement, f"{position.best:.4f} at step {position.best_step}"
        return f"no improvement in {count} evaluations; the best was {best}"
    return None
