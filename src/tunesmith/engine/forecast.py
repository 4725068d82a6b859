"""What a run will need, measured on the machine it will run on: memory, seconds, and the micro-batch that fits.

Nothing is estimated from the shape of the network. The heaviest micro-batch of the run goes forward and backward before anything
else, so that a run that does not fit fails in its first seconds; two such passes of different size tell what a token costs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.pack import to_device
from tunesmith.engine import batching, distributed, figures, loop, machine, route, samples, setup
from tunesmith.engine.config import TrainConfig
from tunesmith.engine.loop import Job
from tunesmith.errors import RecipeError
from tunesmith.models import kernels

LARGEST = {"cpu": 2048, "cuda": 16384}
"""Tokens in one forward pass beyond which a device is no faster (SmolLM2-135M: 2 cores are at their peak from about 1,000)."""

SMALLEST = 64
SHARE = 0.9
"""Of the memory that is there, what a chosen budget may use: the rest is for what a run does beside training."""

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "adafactor": 0.1, "sgd": 4.0, "lion": 4.0}
"""Optimiser state for each trained parameter (at most), while none has been made yet."""

EVALUATED = 16
"""Held-out rows that are timed."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch forward and backward: ``tokens`` with padding, ``seconds``, ``peak`` bytes held meanwhile."""

    tokens: int
    seconds: float
    peak: int


@dataclass(frozen=True)
class Memory:
    """``heaviest`` pass of the run, bytes that each further token takes, bytes the optimiser is yet to take (``pending``)."""

    heaviest: Pass
    per_token: float
    pending: int

    @property
    def peak(self) -> int:
        """Bytes that the process will hold."""
        return self.heaviest.peak + self.pending

    def tokens_within(self, limit: int) -> int:
        """The largest micro-batch for which the process stays within ``limit`` bytes."""
        if not self.per_token:
            return self.heaviest.tokens
        return int(self.heaviest.tokens + (limit - self.peak) / self.per_token)


def first_budget(config: TrainConfig, device: torch.device) -> int:
    """Tokens of a micro-batch before anything was measured: what was asked for, or as many as make the device fast."""
    wanted = config.micro_batch_tokens
    return wanted if isinstance(wanted, int) else LARGEST.get(device.type, LARGEST["cpu"])


def measure_memory(job: Job) -> Memory:
    """Try one short row, then the heaviest micro-batch of the run under ``job.budget``, which is lowered where that ran out."""
    rows = job.plan.rows(1)
    state = distributed.state()
    mine = list(range(len(rows)))[state.process_index :: state.num_processes] or [0]
    shortest = min(mine, key=lambda place: (job.plan.data.lengths[rows[place]], place))
    small = _pass(job, 1, [shortest])
    step, places = batching.heaviest(job.plan, job.budget, job.packed, state.process_index, state.num_processes)
    large = _pass(job, step, places)
    apart = large.tokens - small.tokens
    per_token = max(0.0, (large.peak - small.peak) / apart) if apart > 0 else 0.0
    masters = job.update.masters
    begun = any(job.update.optimizer.state.values())
    return Memory(large, per_token, 0 if begun else int(masters.size * masters.share * STATE_BYTES[job.config.optim]))


def _pass(job: Job, step: int, places: list[int]) -> Pass:
    lengths = [int(job.plan.data.lengths[row]) for row in job.plan.rows(step)[places]]
    kernels.return_freed_memory()
    with machine.PeakWatch(job.device) as watch:
        started = time.perf_counter()
        loop.rehearse(job, step, places)
        machine.synchronize(job.device)
        seconds = time.perf_counter() - started
    return Pass(sum(lengths) if job.packed else max(lengths) * len(lengths), seconds, watch.peak)


def limit_bytes(device: torch.device) -> int:
    """What this process may hold at most: what it holds and what is left, shared with the other processes of the run."""
    state = distributed.state()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    return machine.memory_bytes() + machine.available_memory_bytes() // state.num_processes


def settle(job: Job, automatic: bool, limit: int | None = None) -> Memory:
    """Run the heaviest micro-batch first, and with ``automatic`` choose ``job.budget`` so that it fits ``limit`` bytes.

    Raises RecipeError, with what is missing and what would fit, when the run cannot fit: before the first step.
    """
    memory = measure_memory(job)
    limit = limit_bytes(job.device) if limit is None else limit
    longest = int(job.plan.data.lengths.max())
    # all processes decide on the same numbers: those of the one that has the least room
    tight = distributed.gather([(memory.peak - SHARE * limit, memory.tokens_within(int(SHARE * limit)), job.budget)])
    over, fitting, job.budget = max(one for one, _, _ in tight), min(one for _, one, _ in tight), min(one for _, _, one in tight)
    if automatic and over > 0 and fitting >= min(longest, job.budget) and fitting >= SMALLEST:
        job.budget = _rounded(fitting)
        memory = measure_memory(job)
        job.budget = min(distributed.gather([job.budget]))
        return memory
    if any(distributed.gather([memory.peak > limit])):
        raise RecipeError(_does_not_fit(job, memory, limit, fitting, longest))
    return memory


def _rounded(tokens: int) -> int:
    """Down to a multiple of 64, so that a little noise of the measurement chooses the same."""
    return max(SMALLEST, tokens // 64 * 64)


def _does_not_fit(job: Job, memory: Memory, limit: int, fitting: int, longest: int) -> str:
    return (
        f"this run needs about {figures.size(memory.peak)} at once and {figures.size(limit)} are there: "
        f"{figures.size(memory.peak - limit)} are missing (its heaviest micro-batch has {memory.heaviest.tokens:,} tokens).\n"
        f"  {'; '.join(remedies(job, memory, fitting, longest))}."
    )


def remedies(job: Job, memory: Memory, fitting: int, longest: int) -> list[str]:
    """What would make a run fit, the least harmful first. A smaller micro-batch changes no result."""
    found = []
    if fitting >= max(longest, SMALLEST):
        found.append(f"Would fit, with the same result: train.micro_batch_tokens={_rounded(fitting)}")
    elif memory.heaviest.tokens > longest:
        found.append(f"train.micro_batch_tokens={longest} (the longest row) would save some")
    if not job.config.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true keeps one layer's activations instead of all")
    if fitting < longest:
        found.append(f"the longest row has {longest:,} tokens: lower train.max_length, with objective.overlong=truncate or drop")
    return [
        *found,
        "adaptation=lora (where it is full) keeps no optimiser state for the whole network, and so does a smaller model",
    ]


# --------------------------------------------------------------------------------------------------- the whole run


def forecast(
    ready: setup.Setup, loading_from: float, limit: int | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Load the model, take real steps, and say what the run will need. Nothing of it is kept.

    ``loading_from``: ``time.perf_counter()`` of the start, for the seconds before the first step. ``limit``: bytes that the run
    may hold, to plan for another machine. ``say`` is told what is being done.

    Keys: micro_batch_tokens, heaviest_tokens, peak_memory_bytes (above what the process held before the model, as in a run's
    result), needed_memory_bytes and memory_limit_bytes (of the process), fits, remedies, seconds_per_step, tokens_per_second,
    train_seconds, evaluation_seconds (each), evaluations, total_seconds.
    """
    before = machine.peak_memory_bytes()
    say("loading the model")
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        built = setup.build(ready, Path(folder))
    job = Job(
        model=built.model, objective=ready.objective, update=built.update, plan=ready.plan, config=ready.recipe.train,
        packed=built.route.packed, budget=first_budget(ready.recipe.train, ready.device), device=ready.device, noise=built.noise,
        log=lambda record: None, evaluate=lambda at: None, save=lambda at: None,
    )  # fmt: skip
    limit = limit_bytes(ready.device) if limit is None else limit
    automatic = ready.recipe.train.micro_batch_tokens == "auto"
    say("trying the heaviest micro-batch")
    try:
        settle(job, automatic, limit)
        fits = True
    except RecipeError:
        fits = False
    started = time.perf_counter() - loading_from
    say("taking three steps")
    seconds, tokens, update = _timed_steps(job)
    memory = measure_memory(job)  # again, now that the optimiser has its state
    say("evaluating some rows")
    evaluation = _evaluation_seconds(job, ready, built.route)
    peak = int(torch.cuda.max_memory_allocated(ready.device)) if ready.device.type == "cuda" else machine.peak_memory_bytes()
    needed = max(peak, memory.peak)
    in_all = _tokens_of_run(ready.plan)
    train_seconds = in_all * seconds / tokens + ready.plan.steps * update
    train = ready.recipe.train
    evaluations = 0 if ready.data.eval is None else 1 + sum(
        step == ready.plan.steps or batching.due(train.eval_steps, step, ready.plan.steps, ready.plan.steps_per_epoch)
        for step in range(1, ready.plan.steps + 1)
    )  # fmt: skip
    fits = fits and needed <= limit
    longest = int(ready.data.train.lengths.max())
    return {
        "micro_batch_tokens": job.budget,
        "heaviest_tokens": memory.heaviest.tokens,
        "peak_memory_bytes": needed - (0 if ready.device.type == "cuda" else before),
        "needed_memory_bytes": needed,
        "memory_limit_bytes": limit,
        "fits": fits,
        "remedies": [] if fits else remedies(job, memory, memory.tokens_within(int(SHARE * limit)), longest),
        "seconds_per_step": train_seconds / ready.plan.steps,
        "tokens_per_second": in_all / train_seconds,
        "train_seconds": train_seconds,
        "evaluation_seconds": evaluation,
        "evaluations": evaluations,
        "total_seconds": started + train_seconds + evaluations * evaluation,
    }


def _timed_steps(job: Job) -> tuple[float, int, float]:
    """(seconds, tokens) of forward and backward, and seconds of an update: real steps of the plan, the first to warm up."""
    passes, updates, tokens = 0.0, [], 0
    chosen = _typical(job.plan)
    for number, at in enumerate([chosen[0], *chosen]):
        step = loop.planned(job, at)
        started = time.perf_counter()
        job.model.train()
        loop.accumulate(job, step, float(sum(int(job.objective.count(one.batch)) for one in step.micro)) or 1.0)
        machine.synchronize(job.device)
        between = time.perf_counter()
        job.update.norm()
        job.update.apply(at)
        machine.synchronize(job.device)
        if number > 0:
            passes += between - started
            updates.append(time.perf_counter() - between)
            tokens += sum(sum(one.lengths) for one in step.micro)
    return passes, max(1, tokens), min(updates)


def _typical(plan: batching.Plan) -> list[int]:
    """The two steps, of the first fifty, that are nearest to the mean number of tokens."""
    first = range(1, min(plan.steps, 50) + 1)
    mean = _tokens_of_run(plan) / plan.steps
    return sorted(first, key=lambda step: abs(int(plan.data.lengths[plan.rows(step)].sum()) - mean))[:2]


def _tokens_of_run(plan: batching.Plan) -> int:
    """Tokens over all steps; of a very long run from the mean of its first steps."""
    looked_at = min(plan.steps, batching.LOOKED_AT)
    tokens = sum(int(plan.data.lengths[plan.rows(step)].sum()) for step in range(1, looked_at + 1))
    return int(tokens * plan.steps / looked_at)


def _evaluation_seconds(job: Job, ready: setup.Setup, chosen: route.Route) -> float:
    """Of one evaluation: some rows of the held-out ones, spread over their lengths, and the fixed prompts."""
    data = ready.data.eval
    if data is None:
        return 0.0
    order = np.argsort(data.lengths, kind="stable")
    rows = [int(row) for row in order[np.linspace(0, len(order) - 1, min(EVALUATED, len(order))).astype(int)]]
    job.model.eval()
    started = time.perf_counter()
    with torch.no_grad():
        for group in batching.micro_batches([int(data.lengths[row]) for row in rows], job.budget, job.packed):
            batch = job.objective.collate([data[rows[place]] for place in group], job.packed)
            job.objective.evaluate(job.model, to_device(batch, job.device))
    machine.synchronize(job.device)
    seconds = (time.perf_counter() - started) * float(data.lengths.sum() / data.lengths[rows].sum())
    asked = samples.prompts(ready.recipe.samples, data, ready.tokenizer)
    if asked:
        started = time.perf_counter()
        with route.plain_attention(job.model, chosen):
            samples.answer(job.model, ready.tokenizer, asked, ready.recipe.samples.max_new_tokens)
        seconds += time.perf_counter() - started
    return seconds
