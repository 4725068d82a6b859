"""A recipe becomes a run: set up, train, keep, report. ``train`` and ``check`` are the public functions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith import __version__
from tunesmith import recipe as recipes
from tunesmith.engine import checkpoint, distributed, folder, loop, machine, optim, report, route, samples, setup, tracking
from tunesmith.engine.loop import Job, Progression
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.models import head, kernels, probe
from tunesmith.recipe import Recipe


@dataclass
class Run:
    """The open run: its objects and files. ``asked`` are the prompts of evaluation."""

    setup: setup.Setup
    folder: folder.RunFolder
    model: Any
    masters: optim.Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    route: route.Route
    metrics: tracking.Metrics
    answers: tracking.Metrics
    progress: tracking.Progress
    main: bool
    asked: list[samples.Prompt] = field(default_factory=list)


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    console: Any = None,
) -> dict[str, Any]:
    """Train as ``recipe`` says (a path, a mapping or a Recipe) into the run folder ``out``.

    ``overrides``: ``key=value`` strings. ``resume``: go on from the last good checkpoint of ``out``. ``console``: a rich console
    for progress, None = silent. Returns eval_loss_before, eval_loss, perplexity_before, perplexity, tokens_per_second,
    peak_memory_bytes (above what the process held before the model), trainable_parameters, total_parameters, model_dir, run_dir,
    report, steps, best_step, tokens, train_seconds, samples and stopped.

    Raises UserError before weights load, StoppedError (not finite, disk full) and Interrupted with the last checkpoint
    kept.
    """
    chosen = _resolve(recipe, overrides)
    target = Path(out or Path("runs") / (Path(recipe).stem if isinstance(recipe, str | Path) else "run")).resolve()
    state = distributed.state()
    main = state.is_main_process
    if resume:
        folder.check_resumable(target, chosen.resolved())
    elif main:
        folder.check_free(target)
    kernels.keep_freed_memory()
    with tracking.Progress(console if main else None) as progress:
        ready = setup.read(chosen, state.device, progress.note)
        run_folder = folder.take(target, chosen.resolved()) if main else folder.RunFolder(target)
        try:
            return _run(ready, run_folder, progress, main)
        finally:
            run_folder.close()


def check(recipe: Recipe | dict[str, Any] | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """All that can be known without loading weights: data and masks, steps, parameters, number formats. Raises UserError."""
    chosen = _resolve(recipe, overrides)
    ready = setup.read(chosen, distributed.state().device, lambda line: None)
    return {
        "model": str(ready.model_folder.path),
        "objective": chosen.resolved()["objective"],
        "adaptation": chosen.resolved()["adaptation"],
        "data": ready.data.report.as_dict(),
        "steps": ready.plan.steps,
        "steps_per_epoch": ready.plan.steps_per_epoch,
        "learning_rate": chosen.train.learning_rate,
        "max_length": ready.data.max_length,
        "trainable_parameters": ready.parameters["trainable"],
        "total_parameters": ready.parameters["total"],
        "trainable_percent": 100 * ready.parameters["trainable"] / ready.parameters["total"],
        "precision": ready.precision.as_dict(),
    }


def _resolve(recipe: Recipe | dict[str, Any] | str | Path, overrides: Sequence[str]) -> Recipe:
    """The checked recipe with the adaptation's own learning rate filled in."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides go with a path or a mapping; this recipe is already built")
        chosen = recipe
    elif isinstance(recipe, dict):
        chosen = recipes.parse(recipe, overrides)
    else:
        chosen = recipes.load(recipe, overrides)
    if chosen.train.learning_rate is not None:
        return chosen
    from tunesmith import adaptations

    default = adaptations.module(adaptations.name_of(chosen.adaptation)).Adaptation.learning_rate
    return chosen.model_copy(update={"train": chosen.train.model_copy(update={"learning_rate": default})})


def _run(ready: setup.Setup, run_folder: folder.RunFolder, progress: tracking.Progress, main: bool) -> dict[str, Any]:
    train_config = ready.recipe.train
    before_model = machine.peak_memory_bytes()
    model, masters, noise, said = setup.build(ready, run_folder.path)
    first = [ready.data.train[int(row)] for row in _shortest(ready.data.train.lengths, ready.plan.rows(1))]
    longest = int(max(ready.data.train.lengths.max(), ready.data.eval.lengths.max() if ready.data.eval else 0))
    chosen_route = route.choose(model, ready.objective, first, longest, train_config.packing, ready.device)
    masters.listen()
    optimizer = optim.adamw(masters, train_config, float(train_config.learning_rate or 0))
    run = Run(
        ready, run_folder, model, masters, optimizer, optim.schedule(optimizer, train_config, ready.plan.steps), chosen_route,
        tracking.Metrics(run_folder.path / "metrics.jsonl"), tracking.Metrics(run_folder.path / "samples.jsonl"), progress, main,
    )  # fmt: skip
    run.asked = samples.prompts(ready.recipe.samples, ready.data.eval, ready.tokenizer) if main else []
    for line in [*said, *chosen_route.notes, _parameters_line(ready), _precision_line(ready)]:
        progress.note(line)
    at = _restore(run)
    if main:
        _record_start(run)
    job = Job(
        model=model, objective=ready.objective, masters=masters, optimizer=optimizer, schedule=run.schedule, plan=ready.plan,
        config=train_config, packed=chosen_route.packed, device=ready.device, noise=noise, log=lambda record: _log(run, record),
        evaluate=lambda now: _evaluate(run, now), save=lambda now: _save(run, now),
    )  # fmt: skip
    progress.start(at.step, ready.plan.steps)
    try:
        if at.step == 0:
            _evaluate(run, at)
        stopped = loop.fit(job, at)
    except TunesmithError as error:
        if main:
            run_folder.record(notes=_notes(run), stopped=f"{type(error).__name__}: {error}")
            report.write_report(run_folder.path)
        raise
    if ready.data.eval is None and main:
        _save_model(run)
    progress.stop()
    return _finish(run, at, job, before_model, stopped) if main else {}


def _shortest(lengths: np.ndarray, rows: np.ndarray) -> list[int]:
    """The two shortest rows of a step: the route is tried on them."""
    return [int(row) for row in sorted(rows, key=lambda row: (lengths[row], row))[:2]]


# ------------------------------------------------------------------------------------------- what the loop calls back


def _log(run: Run, record: dict[str, Any]) -> None:
    if run.main:
        record = {**record, "memory_bytes": machine.memory_bytes(), "time": time.time()}
        run.metrics.append(record)
        if record["kind"] == "train":
            run.progress.log(record)


def _evaluate(run: Run, at: Progression) -> float | None:
    """Evaluate, keep the model when it is the best yet, answer the fixed prompts. Returns the figure that chooses the best."""
    ready = run.setup
    if ready.data.eval is None:
        return None
    run.progress.doing("evaluating")
    started = time.perf_counter()
    budget = ready.recipe.train.micro_batch_tokens
    figures = loop.evaluate(run.model, ready.objective, ready.data.eval, run.route.packed, budget, ready.device)
    seconds = time.perf_counter() - started
    name, direction = ready.objective.best
    best = at.step > 0 and loop.improved(at, figures[name], direction, ready.recipe.train.early_stopping_threshold)
    if best and run.main:
        _save_model(run)
    record = {
        "kind": "eval",
        "step": at.step,
        "epoch": round(ready.plan.epoch(at.step), 6),
        **figures,
        "best": best,
        "seconds": seconds,
    }
    if run.main:
        run.metrics.append({**record, "time": time.time()})
        run.progress.evaluation(record)
        _answer(run, at.step)
    run.progress.doing(None)
    return figures[name]


def _answer(run: Run, step: int) -> None:
    if run.asked:
        with _plain_attention(run):
            answers = samples.answer(run.model, run.setup.tokenizer, run.asked, run.setup.recipe.samples.max_new_tokens)
        for prompt, answer in zip(run.asked, answers, strict=True):
            run.answers.append({"step": step, "prompt": prompt.text, "answer": answer, "reference": prompt.reference})


@contextmanager
def _plain_attention(run: Run) -> Iterator[None]:
    """Generation keeps a cache and has no segments: it takes the model's own attention."""
    inner = head.base(run.model)
    ours = inner.config._attn_implementation
    inner.set_attn_implementation(run.route.attention)
    run.model.eval()
    try:
        yield
    finally:
        inner.set_attn_implementation(ours)


def _save_model(run: Run) -> None:
    """The model as it stands, in the Hub's or peft's own format, with tokenizer, template and probe: ready for anybody's code."""

    def write(target: Path) -> None:
        with run.route.fused.disabled(), _plain_attention(run):
            with run.masters.in_place():
                run.setup.adaptation.save(run.model, target)
                run.setup.tokenizer.save_pretrained(target)
                if run.masters.all_of(run.model):
                    probe.write_probe(target, run.model, run.setup.tokenizer)
            if not run.masters.all_of(run.model):  # fp32 parts in a bf16 network would not fit together: the copies answer
                probe.write_probe(target, run.model, run.setup.tokenizer)

    needed = 4 * sum(master.numel() for master in run.masters.masters.values()) + 8 * 2**20
    checkpoint.publish(run.folder.model, write, needed)


def _save(run: Run, at: Progression) -> None:
    """A checkpoint from which the run goes on bit for bit."""
    if run.main:
        run.progress.doing("saving")
        tensors = {f"master.{name}": master for name, master in run.masters.masters.items()}
        for name, master in run.masters.masters.items():
            for key, value in run.optimizer.state[master].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if run.setup.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(run.setup.device)
        state = {
            "progression": asdict(at),
            "schedule": {key: value for key, value in run.schedule.state_dict().items() if _is_plain(value)},
            "learning_rates": [group["lr"] for group in run.optimizer.param_groups],
            "data": run.setup.data.report.as_dict()["sources"],
            "threads": torch.get_num_threads(),
        }
        run.metrics.sync()
        run.answers.sync()
        checkpoint.save(run.folder.checkpoints, at.step, tensors, json.loads(json.dumps(state, default=str)))
        pinned = {at.best_step} if at.best_step is not None else set()
        checkpoint.rotate(run.folder.checkpoints, run.setup.recipe.train.save_total_limit, pinned)
        run.progress.doing(None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | type(None)) or (isinstance(value, list) and all(map(_is_plain, value)))


def _restore(run: Run) -> Progression:
    """Put the newest good checkpoint back, and drop what was written after it. A fresh Progression when there is none."""
    found = checkpoint.newest(run.folder.checkpoints, run.progress.note)
    if found is None:
        if run.main:
            run.metrics.rewind(-1)
            run.answers.rewind(-1)
        return Progression()
    tensors, state = found
    sources = {source["path"]: source["sha256"] for source in state["data"]}
    for source in run.setup.data.report.as_dict()["sources"]:
        if sources.get(source["path"]) != source["sha256"]:
            raise RecipeError(
                f"the data file {source['path']} changed since the run was started, so going on would not be the same run.\n"
                "  Put the old file back, or start another run with --out DIR."
            )
    with torch.no_grad():
        for name, master in run.masters.masters.items():
            master.copy_(tensors[f"master.{name}"])
            prefix = f"optimizer.{name}."
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            run.optimizer.state[master] = {
                key: value if key == "step" else value.to(master.device) for key, value in kept.items()
            }
    run.schedule.load_state_dict({**run.schedule.state_dict(), **state["schedule"]})
    for group, rate in zip(run.optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and run.setup.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], run.setup.device)
    at = Progression(**state["progression"])
    run.masters.publish(run.setup.recipe.seed, at.step)
    if state["threads"] != torch.get_num_threads():
        run.progress.note(
            f"the run used {state['threads']} threads, now {torch.get_num_threads()}: it goes on, but not bit for bit"
        )
    if run.main:
        run.metrics.rewind(at.step)
        run.answers.rewind(at.step)
    run.progress.note(f"resumed after step {at.step}")
    return at


# -------------------------------------------------------------------------------------------------- what is written down


def _parameters_line(ready: setup.Setup) -> str:
    trainable, total = ready.parameters["trainable"], ready.parameters["total"]
    return f"parameters: {trainable:,} trained of {total:,} ({100 * trainable / total:.2f}%)"


def _precision_line(ready: setup.Setup) -> str:
    plan = ready.precision.as_dict()
    return f"precision: {plan['compute']} ({plan['why']}); trained weights {plan['trained_weights']}"


def _notes(run: Run) -> list[str]:
    """What was said of the run and stands nowhere else in the manifest."""
    known = {*run.setup.data.report.lines(), _parameters_line(run.setup), _precision_line(run.setup)}
    return [note for note in run.progress.notes if note not in known]


def _record_start(run: Run) -> None:
    ready = run.setup
    created = run.folder.manifest().get("created", datetime.now(UTC).isoformat(timespec="seconds"))
    run.folder.record(
        tunesmith=__version__,
        created=created,
        command=" ".join(sys.argv),
        model={"name": ready.recipe.model, "path": str(ready.model_folder.path), "kind": ready.model_folder.kind},
        objective=ready.recipe.resolved()["objective"],
        adaptation=ready.recipe.resolved()["adaptation"],
        parameters=ready.parameters,
        data=ready.data.report.as_dict(),
        steps=ready.plan.steps,
        seed=ready.recipe.seed,
        precision=ready.precision.as_dict(),
        route=run.route.as_dict(),
        machine=machine.describe(),
        notes=_notes(run),
    )


def _finish(run: Run, at: Progression, job: Job, before_model: int, stopped: str | None) -> dict[str, Any]:
    """The result, also kept in the manifest, and the report."""
    evaluations = [record for record in tracking.read(run.metrics.path) if record["kind"] == "eval"]
    first = next((record for record in evaluations if record["step"] == 0), {})
    best = next((record for record in evaluations if record["step"] == at.best_step), {})
    earlier = run.folder.manifest().get("result", {})
    if run.setup.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.setup.device)
    else:
        peak = machine.peak_memory_bytes() - before_model
    result = {
        "eval_loss_before": first.get("eval_loss"),
        "eval_loss": best.get("eval_loss"),
        "perplexity_before": first.get("perplexity"),
        "perplexity": best.get("perplexity"),
        "tokens_per_second": job.trained_tokens / job.seconds if job.seconds else earlier.get("tokens_per_second"),
        "train_seconds": job.seconds,
        "peak_memory_bytes": peak,
        "trainable_parameters": run.setup.parameters["trainable"],
        "total_parameters": run.setup.parameters["total"],
        "model_dir": str(run.folder.model),
        "run_dir": str(run.folder.path),
        "report": str(run.folder.path / "report.html"),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "stopped": stopped,
        "samples": _before_and_after(run, at),
    }
    run.folder.record(result=result, notes=_notes(run), finished=datetime.now(UTC).isoformat(timespec="seconds"))
    report.write_report(run.folder.path)
    return result


def _before_and_after(run: Run, at: Progression) -> list[dict[str, Any]]:
    answers = tracking.read(run.answers.path)
    after = {record["prompt"]: record["answer"] for record in answers if record["step"] == at.best_step}
    return [
        {"prompt": one["prompt"], "before": one["answer"], "after": after.get(one["prompt"]), "reference": one["reference"]}
        for one in answers
        if one["step"] == 0
    ]
