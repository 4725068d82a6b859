"""Choose the number of steps that fit into ``train.max_minutes``, once, from a measurement at the start.

The manifest keeps the plan. A resumed or reproduced run reads it there, so it takes the same steps with the
same learning rates on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from tunesmith import machine
from tunesmith.errors import RewardError
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import duration
from tunesmith.runs.run_folder import RunFolder
from tunesmith.train import distributed, forecast, setup
from tunesmith.train.loop import Job
from tunesmith.train.master_weights import TrainedWeights
from tunesmith.train.run_state import Run
from tunesmith.train.train_config import TrainConfig


def follow(run: Run, job: Job, started: float) -> None:
    """Measure the run, choose its number of steps and set it in ``run`` and ``job``.

    Does nothing if the number is chosen already. The measurement changes no weight: trained weights and
    random state are restored afterwards, and optimiser and schedule are made again. ``started``: when the
    program began, by ``time.perf_counter``.
    """
    minutes, most = run.setup.recipe.train.max_minutes, run.setup.source.plan.steps
    if minutes is None or run.setup.time_planned:
        return
    run.progress.doing("measuring the time of a step")
    with _answers_kept(run), _restored(run.update.masters, job.device):
        costs = forecast.measure(job, run.setup, run.fast_path)
    spent = time.perf_counter() - started
    steps = distributed.broadcast(costs.most_steps(run.setup, forecast.time_left(minutes, spent)))
    run.setup = setup.with_steps(run.setup, steps)
    run.update = setup.fresh_update(run.setup, run.model, run.update.masters)
    job.source, job.update = run.setup.source, run.update
    total = spent + costs.total(run.setup, steps)
    run.progress.doing(None)
    run.progress.note(_line(minutes, steps, most, costs, total))
    if run.main:
        facts = {"max_minutes": minutes, "steps": steps, "most_steps": most, "expected_seconds": total}
        run.folder.record(time_plan={**facts, "spent_seconds": spent, "measured": asdict(costs)})


def recorded_steps(folder: RunFolder) -> int | None:
    """Return the number of steps that a resumed run chose at its first start; None if it chose none."""
    plan: JsonObject = (folder.manifest().get("time_plan") or {}) if folder.start == "resume" else {}
    steps: int | None = plan.get("steps")
    return steps


def fixed(train: TrainConfig, manifest: JsonObject) -> TrainConfig:
    """Return ``train`` with the number of steps from a run's ``manifest``, to take the same steps again."""
    plan = manifest.get("time_plan")
    chosen = {"max_minutes": None, "max_steps": plan["steps"], "epochs": 1.0} if plan else {}
    return train.model_copy(update=chosen)


def notes(ready: setup.Setup) -> list[str]:
    """Return the lines that ``check`` prints about the time limit without a measurement."""
    minutes, most = ready.recipe.train.max_minutes, ready.source.plan.steps
    if minutes is None:
        return []
    return [
        f"train.max_minutes {minutes:g}: at most {most:,} steps; the start of the run measures how many of them fit "
        "(check --measure measures it, too)"
    ]


def _line(minutes: float, steps: int, most: int, costs: forecast.Costs, total: float) -> str:
    """Return a line with the number of steps and its reason."""
    head = f"train.max_minutes {minutes:g}: {steps:,} of {most:,} steps"
    if steps == most:
        head = f"train.max_minutes {minutes:g}: all {most:,} steps fit"
    measured = f"a step takes {costs.step:.2f} s, an evaluation {costs.evaluation:.1f} s"
    line = f"{head}, because {measured}; the run will end after about {duration(total)}"
    return f"warning: {line}, later than asked for" if total > 60 * minutes else line


@contextmanager
def _answers_kept(run: Run) -> Iterator[None]:
    """Record a RewardError of the measurement. Its answers are those of the run's first iteration, in the file
    that a resumed run reads."""
    try:
        yield
    except RewardError as error:
        error.args = (
            f"{error}\n  The answers are saved: their scoring is repeated with --resume. Correct the reward first: "
            "else it fails.",
        )
        if run.main:
            run.folder.record(stopped=f"{type(error).__name__}: {error}")
        raise


@contextmanager
def _restored(masters: TrainedWeights, device: torch.device) -> Iterator[None]:
    """Restore trained weights, their working copies and torch's random state after the block."""
    weights = {**masters.whole(), **{f"network {name}": one for name, one in masters.parameters.items()}}
    saved = {name: tensor.detach().clone() for name, tensor in weights.items()}
    with machine.fork_rng(device):
        yield
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[name])
    masters.clear()
