"""The open run, and how it is saved: the model, and checkpoints from which it continues bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import files
from tunesmith.data.data_config import READING_KEYS
from tunesmith.errors import NonFiniteError, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import lora_factors, virtual_tokens
from tunesmith.models.fast import kernels
from tunesmith.models.find import record
from tunesmith.models.generate import stop_tokens
from tunesmith.models.heads import value_head
from tunesmith.models.load import finite, head_loading, probe
from tunesmith.models.network import base
from tunesmith.objectives import head_config
from tunesmith.runs import metrics_file
from tunesmith.runs import run_folder as folder
from tunesmith.runs.progress import Progress
from tunesmith.runs.trackers import Trackers
from tunesmith.train import adapter_choice, checkpoint, distributed, reference, samples, setup
from tunesmith.train.callbacks import Callbacks
from tunesmith.train.fast_path import FastPath, plain_attention
from tunesmith.train.master_weights import swapped_weights
from tunesmith.train.progression import Progression
from tunesmith.train.starting_point import StartingPoint
from tunesmith.train.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Run:
    """The objects and files of an open run."""

    setup: setup.Setup
    folder: folder.RunFolder
    model: PreTrainedModel
    update: Update
    fast_path: FastPath
    metrics: metrics_file.Metrics
    answers: metrics_file.Metrics
    """samples.jsonl."""
    progress: Progress
    main: bool
    callbacks: Callbacks
    resumed: bool
    started_with: StartingPoint | None = None
    """The base model and its tokenizer; see ``train.starting_point``."""
    prompts: list[samples.Prompt] = field(default_factory=list)
    """Sample prompts, answered at every evaluation."""
    trackers: Trackers = field(default_factory=Trackers)


def save_model(run: Run) -> None:
    """Save the current model with tokenizer, template and probe, in the format of the Hub or of peft.

    All processes call it; the main one writes.
    """
    masters, tokenizer = run.update.masters, run.setup.tokenizer
    all_trained = all(parameter.requires_grad for parameter in run.model.parameters())
    weights = masters.whole()
    # a threshold that evaluation chose is part of the config
    head_loading.apply_head_config(base(run.model).config, head_config(run.setup.objective))
    trained = _trained_with(run)
    made_by = adapter_choice.recorded_adaptation(run.setup.recipe, run.setup.model_folder)

    def write(target: Path) -> None:
        with run.fast_path.fused.disabled(), plain_attention(run.model, run.fast_path):
            # the fp32 masters: bf16 copies lose most updates at a low learning rate
            with swapped_weights(masters.parameters, weights):
                with value_head.set_aside(run.model):
                    run.setup.adaptation.save(run.model, target)
                value_head.save(run.model, target)
                tokenizer.save_pretrained(target)
                stop_tokens.save_stop_ids(target, run.model, tokenizer)
                if all_trained:
                    probe.write_probe(target, run.model, tokenizer, made_by, trained)
            if (
                not all_trained
            ):  # a mix of fp32 masters and bf16 weights cannot run: the bf16 copies answer the probe
                probe.write_probe(target, run.model, tokenizer, made_by, trained)

    if run.main:
        kernels.return_freed_memory()  # saving takes as much memory as the weights
        files.publish_folder(run.folder.model, write, 4 * masters.size + 8 * 2**20)


def _trained_with(run: Run) -> JsonObject:
    """Return the facts about the training that are saved with the model (``record.trained``)."""
    recipe, start = run.setup.recipe, run.setup.model_folder.path
    keys = {*READING_KEYS} - {"columns"}
    readings = [
        source.model_dump(include=keys, exclude_defaults=True)
        | (
            {"columns": source.mapping} if source.mapping else {}
        )  # without keep_if, which selects training rows only
        for source in recipe.data.train
    ]
    return {
        "objective": recipe.resolved()["objective"],
        "readings": [reading for reading in readings if reading],
        "rows": list(run.setup.data.kinds),
        **({"task": recipe.task} if recipe.task else {}),
        "max_length": recipe.train.max_length,
        "start": {
            "model": recipe.model,
            "path": str(start),
            "files": record.file_hashes(start),
            "exact": recipe.adapter == "continue"
            or not (virtual_tokens.count(run.model) or recipe.add_tokens),
        },
    }


def require_finite(run: Run, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NonFiniteError if one of ``tensors`` is not finite after the update of ``step``.

    All processes call it, because all must stop. The loop checks a step's loss before the update; only this
    function checks the result of the last update.
    """
    if not (counts := finite.count_non_finite(tensors)):
        return
    what = finite.describe(counts, tensors)
    if step == 0:
        raise NonFiniteError(
            f"before the first step {what}: the base model, or what the adaptation makes of it, cannot be trained.\n"
            "  Copy or download the model again, or use another train.precision."
        )
    raise NonFiniteError(
        f"step {step}: the update overflowed: {what}. No checkpoint and no model of these weights were saved.\n"
        f"  {_last_checkpoint(run)} --resume would take the same step again: lower train.learning_rate and start another "
        "run with --out DIR."
    )


def require_finite_evaluation(run: Run) -> None:
    """Raise NonFiniteError at the end of a run if no evaluation after step 0 had a finite loss.

    All processes call it; the main one has the records.
    """
    records = metrics_file.read(run.metrics.path) if run.main else []
    losses = [
        one["eval_loss"] for one in records if one["kind"] == "eval" and one["step"] and "eval_loss" in one
    ]
    if distributed.broadcast(bool(losses) and not any(map(math.isfinite, losses))):
        raise NonFiniteError(
            "the loss of every evaluation after the first step is not finite (see metrics.jsonl): the weights are "
            f"finite, and what the network computes is not, so no model of this run is good.\n  {_last_checkpoint(run)} Lower "
            f"train.learning_rate, {run.update.advice}and start another run with --out DIR."
        )


def _last_checkpoint(run: Run) -> str:
    saved = checkpoint.steps(run.folder.checkpoints)
    if not saved:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {run.folder.checkpoints / f'step-{saved[-1]}'}."


def save(run: Run, position: Progression) -> None:
    """Save a checkpoint. All processes call it; the main one writes.

    Raises NonFiniteError and saves nothing if a trained weight or the optimiser's state is not finite.
    """
    tensors = run.update.tensors()
    require_finite(run, position.step, {name.removeprefix("master."): one for name, one in tensors.items()})
    if run.main:
        run.progress.doing("saving")
        tensors["random.cpu"] = torch.get_rng_state()
        if run.setup.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(run.setup.device)
        if run.setup.reference is not None:
            tensors |= run.setup.reference.tensors()
        source_tensors, source_state = run.setup.source.state()
        tensors |= {f"source.{name}": tensor for name, tensor in source_tensors.items()}
        state = {
            "progression": asdict(position),
            **run.update.state(),
            "data": run.setup.data.report.as_dict()["sources"],
            "base": run.started_with.facts() if run.started_with else None,
            "held_out": run.setup.data.report.held_out_digest,
            "threads": torch.get_num_threads(),
            "processes": distributed.state().num_processes,
            "compute": run.setup.precision.as_dict()["compute"],
            "starts": lora_factors.start_sketch(run.model),
            "source": source_state,
        }
        run.metrics.sync()
        run.answers.sync()
        checkpoints = run.folder.checkpoints
        checkpoint.save(checkpoints, position.step, tensors, json.loads(json.dumps(state, default=str)))
        if "first_checkpoint" not in run.folder.manifest():
            run.folder.record(first_checkpoint=position.step)
        _rotate(run, position)
        run.progress.doing(None)
    distributed.wait()


def _rotate(run: Run, position: Progression) -> None:
    """Remove the oldest checkpoints beyond the limit."""
    best = {position.best_step} if position.best_step is not None else set()
    checkpoint.rotate(run.folder.checkpoints, run.setup.recipe.train.save_total_limit, best)


def restore(run: Run, step: int | None) -> Progression:
    """Load the checkpoint of ``step`` and drop the records written after it. Returns the position of the run.

    ``step``: None starts from step 0. Raises RecipeError if this machine computes other initial LoRA factors
    or if the reference differs from the run's.
    """
    if step is None:
        _rewind(run, -1)
        return Progression()
    tensors, state = checkpoint.load(run.folder.checkpoints, step)
    if layer := lora_factors.changed_start(run.model, state.get("starts") or {}):
        raise RecipeError(
            f"the LoRA of {layer} starts from a decomposition of the base weights, and this machine computes another "
            "one than the machine that started the run (another processor, device or library). Resuming here would "
            "not continue the same run.\n"
            "  Resume it on that machine, or start another run with --out DIR."
        )
    if run.setup.reference is not None:
        run.setup.reference.load(tensors)
        reference.check_complete(run.setup.reference, run.setup.all_examples(), run.setup.model_folder.path)
    position = Progression(**state["progression"])
    run.update.load(tensors, state)
    prefix = "source."
    source_tensors = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    run.setup.source.load(source_tensors, state.get("source") or {})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and run.setup.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], run.setup.device)
    _note_changes(run, state)
    _rewind(run, position.step)
    if run.main:  # a kill between a save and the removal of the oldest checkpoint leaves one too many
        _rotate(run, position)
    run.progress.note(f"resumed after step {position.step}")
    return position


def _rewind(run: Run, step: int) -> None:
    if run.main:
        run.metrics.rewind(step)
        run.answers.rewind(step)


def _note_changes(run: Run, state: JsonObject) -> None:
    """Print changes of the machine that change the last bits of sums, or the rounding."""
    now = {"processes": distributed.state().num_processes, "threads": torch.get_num_threads()}
    changed = [
        f"{state[key]} {key}, now {value}" for key, value in now.items() if state.get(key, value) != value
    ]
    if changed:
        run.progress.note(
            f"the run used {' and '.join(changed)}: updates are the same except for the last bits of sums"
        )
    compute = run.setup.precision.as_dict()["compute"]
    if state.get("compute", compute) != compute:
        run.progress.note(
            f"warning: the run computed in {state['compute']} so far and continues in {compute}, which rounds differently"
        )
