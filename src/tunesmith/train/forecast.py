"""What a run will need, measured on the machine it will run on: memory, seconds, and the micro-batch that fits.

Nothing is estimated from the shape of the network. The heaviest micro-batch of the run goes forward and backward before anything
else, so that a run that does not fit fails in its first seconds; two such passes of different size tell what a token costs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Source, Step, batch_tokens, heaviest_micro_batch
from tunesmith.errors import RecipeError
from tunesmith.models.fast import kernels
from tunesmith.runs import figure_format, metrics_file
from tunesmith.runs.progress import Progress
from tunesmith.runs.run_folder import RunFolder
from tunesmith.train import (
    distributed,
    fast_path,
    loop,
    machine,
    run_state,
    samples,
    setup,
)
from tunesmith.train.callbacks import Hooks
from tunesmith.train.loop import Job
from tunesmith.train.run_state import Run
from tunesmith.train.train_config import TrainConfig, due

LARGEST = {"cpu": 2048, "cuda": 16384}
"""Tokens in one forward pass beyond which a device is no faster (SmolLM2-135M: 2 cores are at their peak from about 1,000)."""

LOOKED_AT = 2000
"""Steps whose micro-batches are compared to find the heaviest: a tenth of a second."""

SMALLEST = 64
SHARE = 0.9
"""Of the memory that is there, what a chosen budget may use: the rest is for what a run does beside training."""

STATE_BYTES = {
    "adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw": 0.0, "paged_adamw_8bit": 0.0, "adafactor": 0.1, "sgd": 4.0, "lion": 4.0,
}  # fmt: skip
"""Optimiser state for each trained parameter (at most), while none has been made yet. Paged state leaves a full device."""

FEWEST_STEPS, STEPPING = 2, 10.0
"""Steps that are timed at least, and seconds after which no more are taken."""

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


def measure_memory(job: Job, limit: int) -> Memory:
    """Try one short row, then the heaviest micro-batch of the run under ``job.budget``, which is lowered where that ran out.

    A CPU's system does not refuse memory, it kills. So there a micro-batch much larger than usual is first tried in part, and
    where that shows that the whole would hold more than ``limit`` bytes, ``heaviest`` is what it would be.
    """
    state = distributed.state()
    steps = job.source.preview(LOOKED_AT)
    mine = steps[0].share(state.process_index, state.num_processes) or [0]
    shortest = min(mine, key=lambda place: (steps[0].lengths[place], place))
    small = _pass(job, steps[0], [shortest])
    step, places = heaviest_micro_batch(
        steps, job.budget, job.layout, state.process_index, state.num_processes
    )
    masters = job.update.masters
    begun = any(job.update.optimizer.state.values())
    pending = 0 if begun else int(masters.size * masters.share * STATE_BYTES[job.config.optim_name])
    tokens, part = step.tokens(places, job.layout), _part(job, step, places)
    if job.device.type == "cpu" and tokens > 2 * step.tokens(part, job.layout):
        some = _pass(job, step, part)
        per_token = _slope(small, some)
        whole = int(some.peak + (tokens - some.tokens) * per_token)
        if whole + pending > limit:
            return Memory(Pass(tokens, some.seconds * tokens / some.tokens, whole), per_token, pending)
    large = _pass(job, step, places)
    return Memory(large, _slope(small, large), pending)


def _slope(small: Pass, large: Pass) -> float:
    """Bytes that each further token takes."""
    apart = large.tokens - small.tokens
    return max(0.0, (large.peak - small.peak) / apart) if apart > 0 else 0.0


def _part(job: Job, step: Step, places: list[int]) -> list[int]:
    """The first rows of a micro-batch, up to the tokens that a device is fast with; one row at least."""
    most = 1
    while most < len(places) and step.tokens(places[: most + 1], job.layout) <= LARGEST["cpu"]:
        most += 1
    return places[:most]


def _pass(job: Job, step: Step, places: list[int]) -> Pass:
    kernels.return_freed_memory()
    with machine.PeakWatch(job.device) as watch:
        started = time.perf_counter()
        loop.rehearse(job, step, places)
        machine.synchronize(job.device)
        seconds = time.perf_counter() - started
    return Pass(step.tokens(places, job.layout), seconds, watch.peak)


def limit_bytes(device: torch.device) -> int:
    """What this process may hold at most: what it holds and what is left, shared with the other processes of the run."""
    state = distributed.state()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    return machine.memory_bytes() + machine.available_memory_bytes() // state.num_processes


def check_weights(ready: setup.Setup, limit: int) -> None:
    """Raise RecipeError when weights, masters and optimiser alone hold more than ``limit`` bytes: before they are loaded."""
    total, trained = ready.outline.total, ready.outline.trainable
    each = ready.precision.compute.itemsize
    masters = 4 if each < 4 else 0
    sharing = distributed.state().num_processes if ready.sharding else 1
    weights = (total - ready.outline.quantized.parameters) * each + ready.outline.quantized.bytes
    needed = int(weights + trained * (masters + 4 + STATE_BYTES[ready.recipe.train.optim_name]) / sharing)
    if needed > limit:
        raise RecipeError(
            f"the weights, with gradients and the optimiser's state, take {figure_format.size(needed)}, and {figure_format.size(limit)} are "
            f"there: {figure_format.size(needed - limit)} are missing before the first row is read.\n"
            "  Take adaptation=lora (it trains a hundredth of the weights) or qlora (it keeps the others in 4 bits), "
            "train.optim=adafactor, or a smaller model."
        )


def settle(job: Job, automatic: bool, limit: int | None = None) -> Memory:
    """Run the heaviest micro-batch first, and with ``automatic`` choose ``job.budget`` so that it fits ``limit`` bytes.

    Raises RecipeError, with what is missing and what would fit, when the run cannot fit: before the first step.
    """
    limit = limit_bytes(job.device) if limit is None else limit
    memory = measure_memory(job, limit)
    longest = _longest(job)
    # all processes decide on the same numbers: those of the one that has the least room
    tight = distributed.gather(
        [(memory.peak - SHARE * limit, memory.tokens_within(int(SHARE * limit)), job.budget)]
    )
    over, fitting, job.budget = (
        max(one for one, _, _ in tight),
        min(one for _, one, _ in tight),
        min(one for _, _, one in tight),
    )
    if automatic and over > 0 and fitting >= min(longest, job.budget) and fitting >= SMALLEST:
        job.budget = _rounded(fitting)
        memory = measure_memory(job, limit)
        job.budget = min(distributed.gather([job.budget]))
        return memory
    if any(distributed.gather([memory.peak > limit])):
        raise RecipeError(_does_not_fit(job, memory, limit, fitting, longest))
    return memory


def _longest(job: Job) -> int:
    """Tokens of the largest row: no micro-batch can be smaller than it."""
    return max(
        batch_tokens(lengths[[place]], several[[place]], job.layout)
        for step in job.source.preview(LOOKED_AT)
        for lengths, several in [step.data.sizes(step.rows, job.layout)]
        for place in [int(np.argmax(lengths * several))]
    )


def _rounded(tokens: int) -> int:
    """Down to a multiple of 64, so that a little noise of the measurement chooses the same."""
    return max(SMALLEST, tokens // 64 * 64)


def _does_not_fit(job: Job, memory: Memory, limit: int, fitting: int, longest: int) -> str:
    return (
        f"this run needs about {figure_format.size(memory.peak)} at once and {figure_format.size(limit)} are there: "
        f"{figure_format.size(memory.peak - limit)} are missing (its heaviest micro-batch has {memory.heaviest.tokens:,} tokens).\n"
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
        found.append(
            f"the longest row has {longest:,} tokens: lower train.max_length, with objective.overlong=truncate or drop"
        )
    everything = sum(parameter.numel() for parameter in job.model.parameters())
    if job.update.masters.size > everything / 2:
        found.append("adaptation=lora keeps no optimiser state for the whole network")
    return [*found, "a smaller model takes less"]


# --------------------------------------------------------------------------------------------------- the whole run


def forecast(
    ready: setup.Setup,
    loading_from: float,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Load the model, take real steps, and say what the run will need. Nothing of it is kept.

    ``loading_from``: ``time.perf_counter()`` of the start, for the seconds before the first step. ``limit``: bytes that the run
    may hold, to plan for another machine. ``say`` is told what is being done. The model and a checkpoint are saved once, beside
    where runs are kept, and removed.

    Keys: micro_batch_tokens, heaviest_tokens, peak_memory_bytes (above what the process held before the model, as in a run's
    result), needed_memory_bytes and memory_limit_bytes (of the process), fits, remedies, seconds_per_step, tokens_per_second,
    train_seconds, evaluation_seconds (each), evaluations, saving_seconds (in all), reference_seconds, total_seconds.
    """
    before = machine.peak_memory_bytes()
    limit = limit_bytes(ready.device) if limit is None else limit
    check_weights(ready, limit)
    say("loading the model")
    with tempfile.TemporaryDirectory(
        prefix="tunesmith-"
    ) as folder:  # a merged base is written there, and read until the end
        built = setup.build(ready, Path(folder))
        return _of_built(ready, built, loading_from, limit, before, say)


def _of_built(
    ready: setup.Setup,
    built: setup.Built,
    loading_from: float,
    limit: int,
    before: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """``before``: bytes that the process held before it loaded the model."""
    job = Job(
        model=built.model, objective=ready.objective, update=built.update, source=ready.source, config=ready.recipe.train,
        layout=built.route.layout, budget=first_budget(ready.recipe.train, ready.device), device=ready.device, noise=built.noise,
        log=lambda record: None, evaluate=lambda at: None, save=lambda at: None,
    )  # fmt: skip
    automatic = ready.recipe.train.micro_batch_tokens == "auto"
    say("trying the heaviest micro-batch")
    settle(job, automatic, limit)
    started = time.perf_counter() - loading_from
    say("taking a few steps")
    seconds, tokens, update, first = _timed_steps(job)
    memory = measure_memory(job, limit)  # again, now that the optimiser has its state
    say("evaluating some rows")
    evaluation = _evaluation_seconds(job, ready, built.route)
    looked_at = 0.0 if ready.reference is None else sum(_forward_seconds(job, step) for step in ready.seen())
    peak = (
        int(torch.cuda.max_memory_allocated(ready.device))
        if ready.device.type == "cuda"
        else machine.peak_memory_bytes()
    )
    needed = max(peak, memory.peak)
    plan = ready.source.plan
    in_all = _tokens_of_run(ready.source)
    train_seconds = in_all * seconds / tokens + plan.steps * update + first
    train = ready.recipe.train

    def times(every: float | str | None) -> int:
        """How often something falls due, the last step included."""
        steps = range(1, plan.steps + 1)
        return sum(step == plan.steps or due(every, step, plan.steps, plan.steps_per_epoch) for step in steps)

    evaluations = 0 if ready.data.eval is None else 1 + times(train.eval_steps)
    say("saving the model and a checkpoint")
    model_seconds, checkpoint_seconds = _saving_seconds(job, ready, built)
    saving = max(1, evaluations - 1) * model_seconds + times(train.save_steps) * checkpoint_seconds
    fits = needed <= limit
    return {
        "micro_batch_tokens": job.budget,
        "heaviest_tokens": memory.heaviest.tokens,
        "peak_memory_bytes": max(0, needed - (0 if ready.device.type == "cuda" else before)),
        "needed_memory_bytes": needed,
        "memory_limit_bytes": limit,
        "fits": fits,
        "remedies": []
        if fits
        else remedies(job, memory, memory.tokens_within(int(SHARE * limit)), _longest(job)),
        "seconds_per_step": train_seconds / plan.steps,
        "tokens_per_second": in_all / train_seconds,
        "train_seconds": train_seconds,
        "evaluation_seconds": evaluation,
        "evaluations": evaluations,
        "saving_seconds": saving,
        "reference_seconds": looked_at,
        "total_seconds": started + looked_at + train_seconds + evaluations * evaluation + saving,
    }


def _timed_steps(job: Job) -> tuple[float, int, float, float]:
    """(seconds, tokens) of forward and backward, seconds of an update, what the first step takes more: of real steps.

    Each is another step, because other rows make other shapes, and those take time of their own. As many are taken as lie between
    two returns of freed memory, so that their peak is that of a run; of long steps fewer.
    """
    passes, tokens, first, first_tokens = 0.0, 0, 0.0, 0
    updates: list[float] = []
    begun = time.perf_counter()
    for number, step in enumerate(_typical(job.source, 1 + loop.TRIM_STEPS)):
        if len(updates) >= FEWEST_STEPS and time.perf_counter() - begun > STEPPING:
            break
        state = distributed.state()
        even = job.update.masters.in_step
        micro = step.micro_batches(job.budget, job.layout, state.process_index, state.num_processes, even)
        started = time.perf_counter()
        job.model.train()
        loss, _ = loop.accumulate(
            job, step, micro, float(sum(job.objective.count(one.batch) for one in micro)) or 1.0
        )
        machine.synchronize(job.device)
        between = time.perf_counter()
        job.update.norm(loss.double())
        job.update.apply(step.number)
        machine.synchronize(job.device)
        taken = sum(sum(one.lengths) for one in micro)
        if number == 0:
            first, first_tokens = time.perf_counter() - started, taken
            continue
        passes += between - started
        updates.append(time.perf_counter() - between)
        tokens += taken
    tokens, update = max(1, tokens), sum(updates) / len(updates)
    return passes, tokens, update, max(0.0, first - first_tokens * passes / tokens - update)


def _typical(source: Source, number: int) -> list[Step]:
    """So many steps of the first fifty, those nearest to the mean number of tokens; again and again where there are fewer."""
    first = source.preview(50)[:50]
    mean = _tokens_of_run(source) / source.plan.steps
    nearest = sorted(first, key=lambda step: abs(int(step.lengths.sum()) - mean))[:number]
    return [nearest[place % len(nearest)] for place in range(number)]


def _saving_seconds(job: Job, ready: setup.Setup, built: setup.Built) -> tuple[float, float]:
    """Of the model, of a checkpoint. Whatever keeps a run from being saved is met here."""
    runs = Path("runs") if Path("runs").is_dir() else Path()
    beside = runs if os.access(runs, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".tunesmith-", dir=beside) as name:
        folder, empty = RunFolder(Path(name)), metrics_file.Metrics(Path(name) / "metrics.jsonl")
        run = Run(
            ready, folder, built.model, job.update, built.route, empty, empty, Progress(None), True, Hooks()
        )
        seconds = []
        for save in (
            lambda: run_state.save_model(run),
            lambda: run_state.save(run, loop.Progression(step=1)),
        ):
            started = time.perf_counter()
            save()
            seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def _tokens_of_run(source: Source) -> int:
    """Tokens over all steps, from the mean of the first ones."""
    looked_at = source.preview(LOOKED_AT)[:LOOKED_AT]
    tokens = sum(int(step.lengths.sum()) for step in looked_at)
    return int(tokens * source.plan.steps / len(looked_at))


def _evaluation_seconds(job: Job, ready: setup.Setup, chosen: fast_path.Route) -> float:
    """Seconds of one evaluation: the held-out rows and the fixed prompts."""
    data = ready.data.eval
    if data is None:
        return 0.0
    seconds = _forward_seconds(job, Step(0, data, np.arange(len(data)), ready.objective.collate))
    asked = (
        samples.prompts(ready.recipe.samples, data, ready.tokenizer)
        if ready.objective.traits.head == "lm"
        else []
    )
    if asked:
        started = time.perf_counter()
        with fast_path.plain_attention(job.model, chosen):
            samples.answer(job.model, ready.tokenizer, asked, ready.recipe.samples.max_new_tokens)
        seconds += time.perf_counter() - started
    return seconds


def _forward_seconds(job: Job, step: Step) -> float:
    """Seconds of one look at the examples of ``step`` without learning, from some of them, spread over their lengths."""
    order = np.argsort(step.lengths, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(EVALUATED, len(order))).astype(int)]
    some = replace(step, rows=step.rows[chosen])
    job.model.eval()
    started = time.perf_counter()
    with torch.no_grad():
        for places in some.split(job.budget, job.layout):
            batch = some.collate(some.examples(places), job.layout)
            job.objective.evaluate(job.model, to_device(batch, job.device))
    machine.synchronize(job.device)
    return (time.perf_counter() - started) * float(step.lengths.sum() / some.lengths.sum())
