"""Prepare the first step with the loaded model: micro-batch size, number of steps, reference."""

from __future__ import annotations

from tunesmith.train import memory_budget, reference, time_plan
from tunesmith.train.loop import Job
from tunesmith.train.progression import Progression
from tunesmith.train.run_state import Run


def rehearse(run: Run, job: Job, position: Progression, started: float) -> float:
    """Try the heaviest micro-batch, plan the time and compute the reference. Return the reference's seconds.

    ``started``: when the program began, by ``time.perf_counter``.
    """
    if position.step >= run.setup.source.plan.steps:
        return 0.0
    progress, seconds = run.progress, 0.0
    progress.doing("trying the heaviest micro-batch")
    first = job.budget
    automatic = job.config.micro_batch_tokens == "auto" and not position.micro_batch_tokens
    raised = not position.micro_batch_tokens and memory_budget.make_room_for_lanes(job)
    memory_budget.settle(job, automatic or raised, bound_suffices=True)
    if automatic or job.budget < first:
        progress.note(
            f"micro-batches of at most {job.budget:,} tokens fit into memory; the result is the same for any size"
        )
    run.setup.session.budget = job.budget
    time_plan.follow(run, job, started)
    ready = run.setup
    if ready.reference is not None:
        progress.doing("computing the reference")
        steps = ready.all_examples()
        seconds = reference.compute(ready.reference, ready.objective, ready.session, steps, progress.note)
    progress.doing(None)
    return seconds
