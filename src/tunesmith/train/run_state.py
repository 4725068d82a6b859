"""The open run, and what of it is kept: the model, and checkpoints from which it goes on bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import files
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import lora_factors
from tunesmith.models.load import head_loading, probe
from tunesmith.models.network import base
from tunesmith.objectives import head_config
from tunesmith.runs import metrics_file
from tunesmith.runs import run_folder as folder
from tunesmith.runs.progress import Progress
from tunesmith.runs.trackers import Trackers
from tunesmith.train import adapter_choice, checkpoint, distributed, reference, samples, setup
from tunesmith.train import fast_path as route
from tunesmith.train.callbacks import Hooks
from tunesmith.train.loop import Progression
from tunesmith.train.master_weights import holding
from tunesmith.train.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Run:
    """The open run: its objects and files. ``asked`` are the prompts of evaluation."""

    setup: setup.Setup
    folder: folder.RunFolder
    model: PreTrainedModel
    update: Update
    route: route.Route
    metrics: metrics_file.Metrics
    answers: metrics_file.Metrics
    progress: Progress
    main: bool
    hooks: Hooks
    asked: list[samples.Prompt] = field(default_factory=list)
    trackers: Trackers = field(default_factory=Trackers)


def save_model(run: Run) -> None:
    """The model as it stands, in the Hub's or peft's own format, with tokenizer, template and probe: ready for anybody's code.

    All processes call it; the main one writes.
    """
    masters = run.update.masters
    everything = all(parameter.requires_grad for parameter in run.model.parameters())
    weights = masters.whole()
    head_loading.apply_head_config(
        base(run.model).config, head_config(run.setup.objective)
    )  # what evaluation chose is part of it
    made = adapter_choice.keys_that_made(run.setup.recipe, run.setup.model_folder)

    def write(target: Path) -> None:
        with run.route.fused.disabled(), route.plain_attention(run.model, run.route):
            with holding(masters.parameters, weights):  # a bf16 copy has lost most updates of a small rate
                run.setup.adaptation.save(run.model, target)
                run.setup.tokenizer.save_pretrained(target)
                if everything:
                    probe.write_probe(target, run.model, run.setup.tokenizer, made)
            if not everything:  # fp32 parts in a bf16 network would not fit together: the copies answer
                probe.write_probe(target, run.model, run.setup.tokenizer, made)

    if run.main:
        files.publish_folder(run.folder.model, write, 4 * masters.size + 8 * 2**20)


def save(run: Run, at: Progression) -> None:
    """A checkpoint from which the run goes on bit for bit. All processes call it; the main one writes."""
    tensors = run.update.tensors()
    if run.main:
        run.progress.doing("saving")
        tensors["random.cpu"] = torch.get_rng_state()
        if run.setup.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(run.setup.device)
        if run.setup.reference is not None:
            tensors |= run.setup.reference.tensors()
        of_source, plain = run.setup.source.state()
        tensors |= {f"source.{name}": tensor for name, tensor in of_source.items()}
        state = {
            "progression": asdict(at),
            **run.update.state(),
            "data": run.setup.data.report.as_dict()["sources"],
            "threads": torch.get_num_threads(),
            "processes": distributed.state().num_processes,
            "compute": run.setup.precision.as_dict()["compute"],
            "starts": lora_factors.start_sketch(run.model),
            "source": plain,
        }
        run.metrics.sync()
        run.answers.sync()
        checkpoint.save(run.folder.checkpoints, at.step, tensors, json.loads(json.dumps(state, default=str)))
        pinned = {at.best_step} if at.best_step is not None else set()
        checkpoint.rotate(run.folder.checkpoints, run.setup.recipe.train.save_total_limit, pinned)
        run.progress.doing(None)
    distributed.wait()


def restore(run: Run) -> Progression:
    """Put the newest good checkpoint back, and drop what was written after it. A fresh Progression when there is none."""
    found = checkpoint.newest(run.folder.checkpoints, run.progress.note)
    if found is None:
        if run.main:
            run.metrics.rewind(-1)
            run.answers.rewind(-1)
        return Progression()
    tensors, state = found
    sources = {source["path"]: source["sha256"] for source in state["data"]}
    commits = {source["path"]: source.get("revision") for source in state["data"]}
    for source in run.setup.data.report.as_dict()["sources"]:
        if sources.get(source["path"]) != source["sha256"]:
            old = commits.get(source["path"])
            back = (
                f"Type `tunesmith data pull` as before, with --commit {old}"
                if old
                else "Put the old file back"
            )
            raise RecipeError(
                f"the data file {source['path']} changed since the run was started, so going on would not be the same run.\n"
                f"  {back}, or start another run with --out DIR."
            )
    if layer := lora_factors.changed_start(run.model, state.get("starts") or {}):
        raise RecipeError(
            f"what {layer} learns is counted from factors of the base's weights, and this machine decomposes them otherwise than "
            "the one that the run was started on (another processor, device or library), so going on would not be the same run.\n"
            "  Resume it where it was started, or start another run with --out DIR."
        )
    if run.setup.reference is not None:
        run.setup.reference.load(tensors)
        reference.check_known(run.setup.reference, run.setup.seen(), run.setup.model_folder.path)
    at = Progression(**state["progression"])
    run.update.load(tensors, state)
    of_source = {
        name.removeprefix("source."): value for name, value in tensors.items() if name.startswith("source.")
    }
    run.setup.source.load(of_source, state.get("source") or {})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and run.setup.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], run.setup.device)
    now = {"processes": distributed.state().num_processes, "threads": torch.get_num_threads()}
    changed = [
        f"{state[key]} {key}, now {value}" for key, value in now.items() if state.get(key, value) != value
    ]
    if changed:
        run.progress.note(
            f"the run used {' and '.join(changed)}: the same update but for the last bits of sums, not bit for bit"
        )
    compute = run.setup.precision.as_dict()["compute"]
    if state.get("compute", compute) != compute:
        run.progress.note(
            f"warning: the run computed in {state['compute']} so far, and goes on in {compute}: other roundings"
        )
    if run.main:
        run.metrics.rewind(at.step)
        run.answers.rewind(at.step)
    run.progress.note(f"resumed after step {at.step}")
    return at
