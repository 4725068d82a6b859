"""Find the micro-batch size that fits into memory, by trying the heaviest micro-batch before the first step.

Two passes of different size measure the bytes per token. A run that exceeds the memory limit stops in its
first seconds, and its error names a size that fits. ``micro_batch_tokens: auto`` takes that size. A run that
needs far less than the limit skips the second pass, which takes seconds on a CPU: its first step is the trial.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from tunesmith import machine
from tunesmith.data.batch.step import Step, batch_tokens, heaviest_micro_batch
from tunesmith.errors import RecipeError
from tunesmith.models.fast import kernels
from tunesmith.runs.figure_format import size
from tunesmith.train import distributed, loop, setup
from tunesmith.train.loop import Job
from tunesmith.train.train_config import TrainConfig

LARGEST = {"cpu": 1792, "cuda": 16384}
"""Tokens at the same time at which throughput saturates.

SmolLM2-135M with LoRA in two lanes on 2 cores with AVX512-BF16: 273, 316 and 309 tokens a second at 1,024, 1,792 and 2,048
tokens, and 267 without lanes.
"""

CPU_FP32 = 1280
"""The same for a CPU that computes in fp32, where each 1,000 tokens keep 0.7 GB for the backward pass. 1,792 tokens would be up
to a tenth faster, and take more memory than transformers.Trainer does.
"""

DEFAULT = {"cpu": LARGEST["cpu"], "cuda": 2048}
"""``train.micro_batch_tokens`` of a recipe that leaves it out."""

LONG_ROWS = 4096
"""Most tokens to which the default is raised, so that the longest rows, too, have one lane each."""

PREVIEWED = 2000
"""Number of steps searched for the heaviest micro-batch. The search takes about 0.1 s."""

SMALLEST = 64
"""Smallest token budget that ``auto`` chooses. It rounds every budget down to a multiple of this number."""
SHARE = 0.9
"""Share of the memory limit that ``auto`` may use. Evaluations, saving and other work need the rest."""
AMPLE = 3
"""The heaviest micro-batch is not tried if this many times the upper bound of its memory is free."""

STATE_BYTES = {
    "adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw": 0.0, "paged_adamw_8bit": 0.0, "adafactor": 0.1, "sgd": 4.0,
    "lion": 4.0,
}  # fmt: skip
"""Upper bound of the optimiser state's bytes per trained parameter, used until the state is allocated.

Paged state counts as 0, because it moves to host memory when the GPU is full.
"""


@dataclass(frozen=True)
class Pass:
    """Measurement of one forward and backward pass over a micro-batch."""

    tokens: int
    """Padding included."""
    seconds: float
    before: int
    """Bytes of the process before the pass."""
    peak: int
    """Peak bytes of the process during the pass."""


@dataclass(frozen=True)
class Memory:
    """Memory of a run's heaviest pass."""

    heaviest: Pass
    per_token: float
    """Bytes of each additional token."""
    pending: int
    """Bytes of the optimiser state, until it is allocated; then 0."""

    @property
    def peak(self) -> int:
        """Bytes that the process holds at its peak, optimiser state included."""
        return self.heaviest.peak + self.pending

    def tokens_within(self, limit: int) -> int:
        """Return the tokens of the largest micro-batch that keeps the process within ``limit`` bytes."""
        if not self.per_token:
            return self.heaviest.tokens
        return int(self.heaviest.tokens + (limit - self.peak) / self.per_token)


def first_budget(config: TrainConfig, device: torch.device, compute: torch.dtype) -> int:
    """Return the token budget to start with: the recipe's, or that of the device; ``auto`` = its largest.

    ``compute``: the number format of the forward pass."""
    wanted = config.micro_batch_tokens
    if isinstance(wanted, int):
        return wanted
    if device.type == "cpu" and compute.itemsize >= 4:
        return CPU_FP32
    of_device = DEFAULT if wanted is None else LARGEST
    return of_device.get(device.type, of_device["cpu"])


def make_room_for_lanes(job: Job) -> bool:
    """Raise ``job.budget`` so that as many of the longest rows as there are lanes run at the same time.

    Returns whether it did: not where the recipe has a budget, nor beyond ``LONG_ROWS``.
    """
    wanted = min(job.layout.lanes * longest_row(job), LONG_ROWS)
    if job.config.micro_batch_tokens is not None or job.layout.lanes == 1 or wanted <= job.budget:
        return False
    job.budget = wanted
    return True


def measure_memory(job: Job, limit: int, bound_suffices: bool = False) -> Memory:
    """Try one short row, then the heaviest micro-batch of the run under ``job.budget``.

    ``bound_suffices``: do not try the heaviest one if the short row shows that memory is ample (see ``AMPLE``);
    ``heaviest`` then holds the upper bound.

    On a CPU the operating system kills a process that takes too much memory. So the first rows of a large
    micro-batch are tried first. If they predict more than ``limit`` bytes, the whole micro-batch is not
    tried, and ``heaviest`` is extrapolated from them.
    """
    state = distributed.state()
    steps = job.source.preview(PREVIEWED)
    mine = steps[0].share(state.process_index, state.num_processes) or [0]
    shortest = min(mine, key=lambda place: (steps[0].lengths[place], place))
    small = _pass(job, steps[0], [shortest])
    step, places = heaviest_micro_batch(
        steps, job.budget, job.layout, state.process_index, state.num_processes
    )
    masters = job.update.masters
    allocated = any(job.update.optimizer.state.values())
    state_bytes = STATE_BYTES[job.config.optim_name]
    pending = 0 if allocated else int(masters.size * masters.share * state_bytes)
    tokens, part = step.tokens(places, job.layout), _first_rows(job, step, places)
    if bound_suffices and job.device.type == "cpu":
        times_longer = 1.0  # attention to packed rows keeps no weights of attention
        if not job.layout.packed:
            times_longer = max(int(one.lengths.max()) for one in steps) / int(steps[0].lengths[shortest])
        gradients = int(4 * masters.size * masters.share)
        bound = _upper_bound(small, gradients, tokens, times_longer)
        if AMPLE * (bound.peak - bound.before + pending) <= limit - bound.before:
            return Memory(bound, (bound.peak - bound.before) / tokens, pending)
    if job.device.type == "cpu" and tokens > 2 * step.tokens(part, job.layout):
        tried = _pass(job, step, part)
        per_token = _slope(small, tried)
        peak = int(tried.peak + (tokens - tried.tokens) * per_token)
        if peak + pending > limit:
            seconds = tried.seconds * tokens / tried.tokens
            return Memory(Pass(tokens, seconds, tried.before, peak), per_token, pending)
    large = _pass(job, step, places)
    return Memory(large, _slope(small, large), pending)


def _slope(small: Pass, large: Pass) -> float:
    """Return the bytes of each additional token."""
    tokens = large.tokens - small.tokens
    return max(0.0, (large.peak - small.peak) / tokens) if tokens > 0 else 0.0


def _upper_bound(small: Pass, gradients: int, tokens: int, times_longer: float) -> Pass:
    """Return an upper bound of a pass over ``tokens`` tokens, from the pass over one short row.

    ``gradients``: their bytes, which are the same for any number of tokens. Everything else that the short row
    needed is taken for memory that grows with the tokens, and with the square of a row's length, as the weights of
    attention do: at least a quarter of its bytes, because a parameter that takes no part has no gradient.
    ``times_longer``: length of the longest row, divided by that of the short one; 1 where nothing grows with the square.
    """
    times = tokens / small.tokens * max(1.0, times_longer)
    needed = max(0, small.peak - small.before)
    growing = max(needed - gradients, needed / 4)
    peak = small.before + int(needed + growing * (times - 1))
    return Pass(tokens, small.seconds * times, small.before, peak)


def _first_rows(job: Job, step: Step, places: list[int]) -> list[int]:
    """Return the first rows of a micro-batch, at least one, up to the tokens that saturate a CPU."""
    count = 1
    while count < len(places) and step.tokens(places[: count + 1], job.layout) <= LARGEST["cpu"]:
        count += 1
    return places[:count]


def _pass(job: Job, step: Step, places: list[int]) -> Pass:
    kernels.return_freed_memory()
    before = machine.memory_bytes()
    with machine.PeakWatch(job.device) as watch:
        started = time.perf_counter()
        loop.rehearse(job, step, places)
        machine.synchronize(job.device)
        seconds = time.perf_counter() - started
    return Pass(step.tokens(places, job.layout), seconds, before, watch.peak)


def limit_bytes(device: torch.device) -> int:
    """Return the most bytes that this process may hold. On a CPU a run's processes share the free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    processes = int(distributed.state().num_processes)
    return machine.memory_bytes() + machine.available_memory_bytes() // processes


def check_weights(ready: setup.Setup, limit: int) -> None:
    """Raise RecipeError, before loading, if weights, gradients and optimiser state exceed ``limit``."""
    total, trained, quantized = ready.outline.total, ready.outline.trainable, ready.outline.quantized
    item = ready.precision.compute.itemsize
    masters = 4 if item < 4 else 0
    processes = distributed.state().num_processes if ready.sharding else 1
    weights = (total - quantized.parameters) * item + quantized.bytes
    state_bytes = STATE_BYTES[ready.recipe.train.optim_name]
    needed = int(weights + trained * (masters + 4 + state_bytes) / processes)
    if needed > limit:
        raise RecipeError(
            f"the weights with their gradients and optimiser state need {size(needed)}, and {size(limit)} are available: "
            f"{size(needed - limit)} are missing before the first row is read.\n"
            "  Take adaptation=lora (it trains a hundredth of the weights) or qlora (it keeps the others in 4 bits), "
            "train.optim=adafactor, or a smaller model."
        )


def settle(job: Job, automatic: bool, limit: int | None = None, bound_suffices: bool = False) -> Memory:
    """Try the heaviest micro-batch and return its memory. ``bound_suffices``: see ``measure_memory``.

    With ``automatic``, lower ``job.budget`` so that the process stays within ``SHARE`` of ``limit`` bytes.
    Raises RecipeError with the missing bytes and the remedies when the run exceeds the limit.
    """
    limit = limit_bytes(job.device) if limit is None else limit
    memory = measure_memory(job, limit, bound_suffices)
    longest = longest_row(job)
    # all processes must decide on the same numbers: those of the process with the least free memory
    mine = (memory.peak - SHARE * limit, memory.tokens_within(int(SHARE * limit)), job.budget)
    excesses, capacities, budgets = zip(*distributed.gather([mine]), strict=True)
    excess, capacity, job.budget = max(excesses), min(capacities), min(budgets)
    if automatic and excess > 0 and capacity >= max(min(longest, job.budget), SMALLEST):
        job.budget = _rounded(capacity)
        memory = measure_memory(job, limit)
        job.budget = min(distributed.gather([job.budget]))
        return memory
    if any(distributed.gather([memory.peak > limit])):
        raise RecipeError(
            f"this run needs about {size(memory.peak)} at once, and {size(limit)} are available: "
            f"{size(memory.peak - limit)} are missing (its heaviest micro-batch has {memory.heaviest.tokens:,} tokens).\n"
            f"  {'; '.join(remedies(job, memory, capacity, longest))}."
        )
    return memory


def longest_row(job: Job) -> int:
    """Return the tokens of the longest row. The micro-batch that holds this row cannot be smaller."""
    largest = 0
    for step in job.source.preview(PREVIEWED):
        sizes = step.data.sizes(step.rows, job.layout)
        place = int(np.argmax(sizes.tokens * sizes.rows))
        largest = max(largest, batch_tokens(sizes, job.layout, [place]))
    return largest


def _rounded(tokens: int) -> int:
    """Round down to a multiple of ``SMALLEST``, so that measurement noise rarely changes the choice."""
    return max(SMALLEST, tokens // SMALLEST * SMALLEST)


def remedies(job: Job, memory: Memory, capacity: int, longest: int) -> list[str]:
    """List changes that reduce a run's memory, the least harmful first.

    A smaller micro-batch comes first, because it changes no result. ``capacity``: tokens of the largest
    micro-batch that fits. ``longest``: tokens of the longest row.
    """
    found = []
    if capacity >= max(longest, SMALLEST):
        found.append(f"Would fit, with the same result: train.micro_batch_tokens={_rounded(capacity)}")
    elif memory.heaviest.tokens > longest:
        found.append(f"train.micro_batch_tokens={longest} (the longest row) would save some")
    if not job.config.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true keeps one layer's activations instead of all")
    if capacity < longest:
        found.append(
            f"the longest row has {longest:,} tokens: lower train.max_length, with objective.overlong=truncate or drop"
        )
    if job.update.masters.size > sum(parameter.numel() for parameter in job.model.parameters()) / 2:
        found.append("adaptation=lora keeps no optimiser state for the whole network")
    return [*found, "a smaller model takes less"]
