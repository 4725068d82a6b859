"""From a recipe to the objects of a run, as a chain: choices, base model, rows, steps, network.

Each function returns what is known after it. Errors are found before weights load; ``check`` stops there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith import adaptations, files, objectives
from tunesmith.adaptations import Adaptation
from tunesmith.data.batch.step import Source, Step, first_examples
from tunesmith.data.read.source import eval_sources
from tunesmith.data.store.data_report import report_rows
from tunesmith.data.store.epochs import Epochs, epochs
from tunesmith.data.store.prepare import Prepared, prepare
from tunesmith.errors import RecipeError
from tunesmith.merge import merge_adapter
from tunesmith.models.find.locate import Folder, code_files, locate
from tunesmith.models.heads import lm_head, noise, value_head
from tunesmith.models.load import compute_dtype, head_loading, load, probe, quantization, vocabulary
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.train import (
    adapter_choice,
    deepspeed_zero,
    device_map,
    distributed,
    evaluation,
    fast_path,
    held_out_answers,
    optimizers,
    precision,
)  # fmt: skip
from tunesmith.train.held_out_answers import HeldOutPrompts
from tunesmith.train.master_weights import Masters, TrainedWeights
from tunesmith.train.meta_model import Outline, build_outline, window_of
from tunesmith.train.reference import Reference
from tunesmith.train.session import RunSession
from tunesmith.train.update import Update
from tunesmith.train.weights_at_start import WeightsAtStart, weights_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Note = Callable[[str], None]
"""Prints one line and keeps it for the manifest."""


@dataclass(frozen=True)
class Choices:
    """Decisions of the recipe and the machine before any file is read."""

    recipe: Recipe
    objective: Objective
    adaptation: Adaptation
    device: torch.device
    precision: precision.Precision
    sharding: deepspeed_zero.Sharding | None
    """DeepSpeed's configuration, if the run uses it."""


@dataclass(frozen=True)
class Base(Choices):
    """The choices, and the base model before its weights load."""

    model_folder: Folder
    config: PretrainedConfig
    """The config with the head of the folder; after the rows are read, with the head that the rows need."""
    tokenizer: PreTrainedTokenizerBase
    """Has the recipe's ``add_tokens``."""
    new_tokens: vocabulary.NewTokens
    outline: Outline
    window: int | None
    """The most tokens that a row may have; None = no limit."""


@dataclass(frozen=True)
class Setup(Base):
    """The base model, the rows and the steps: everything known before weights load."""

    data: Prepared
    source: Source
    session: RunSession
    reference: Reference | None
    """Log-probabilities of the policy at step 0, if the objective compares with them."""
    prompts: HeldOutPrompts | None = None
    """Held-out prompts that the model answers at every evaluation."""
    time_planned: bool = False
    """True once ``train.time_plan`` has chosen the number of steps."""

    def all_examples(self) -> list[Step]:
        """Every example of training and evaluation, each once, except sampled ones."""
        steps = [self.source.distinct()]
        if self.data.eval is not None:
            steps.append(Step(0, self.data.eval, np.arange(len(self.data.eval)), self.objective.collate))
        return [step for step in steps if step is not None]


def read(
    recipe: Recipe,
    device: torch.device,
    note: Note,
    deepspeed: Path | None = None,
    steps: int | None = None,
) -> Setup:
    """Check the recipe and the model folder, read and encode the data, plan the steps.

    ``deepspeed``: a ds_config.json. ``steps``: the number that ``train.time_plan`` chose at an earlier start.
    Raises UserError for a recipe, a model or data that cannot be used.
    """
    load.quiet()
    choices = choose(recipe, device, deepspeed)
    base = open_base(choices, note)
    data = read_rows(base, note)
    return plan_steps(configure_head(base, note), data, steps)


def choose(recipe: Recipe, device: torch.device, deepspeed: Path | None) -> Choices:
    """Choose the device, number formats and sharding. Raises RecipeError for keys that conflict."""
    processes = distributed.state().num_processes
    distributed.check_processes(processes, recipe.train.batch_size, "train.batch_size is")
    device = device_map.device_of(recipe.device_map, device)
    objective = objectives.module(objectives.name_of(recipe.objective)).Objective(recipe.objective)
    adaptation = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation(recipe.adaptation)
    if deepspeed is not None and "quantization_config" in adaptation.load_kwargs():
        raise RecipeError(
            "--deepspeed is not supported with a 4-bit or 8-bit base model: the combination is untested.\n"
            "  Leave out --deepspeed, or choose an adaptation without quantisation."
        )
    if deepspeed is not None and recipe.train.max_minutes is not None:
        raise RecipeError(
            "--deepspeed is not supported with train.max_minutes: the weights of the measured steps cannot be restored.\n"
            "  Leave out one of the two; train.max_steps limits the run, too."
        )
    optimizers.check(recipe.train)
    formats = precision.choose(recipe.train.precision, device, recipe.train.optim_name)
    sharding = None if deepspeed is None else deepspeed_zero.read(deepspeed, recipe.train, formats.compute)
    fast_path.check_compile(recipe.train, device, formats.compute)
    return Choices(recipe, objective, adaptation, device, formats, sharding)


def open_base(choices: Choices, note: Note) -> Base:
    """Find the base model and bind the objective to it. Raises UserError."""
    recipe, objective, adaptation = choices.recipe, choices.objective, choices.adaptation
    folder = locate(recipe.model, recipe.trust_remote_code)
    adapter_choice.check(recipe, folder)
    _note_remote_code(recipe, folder, note)
    config = load.load_config(folder)
    head = objective.traits.head
    head_loading.inherit_head_config(config, folder, recipe.adapter, head)
    tokenizer = load.load_tokenizer(_tokenizer_folder(recipe, folder))
    new_tokens = vocabulary.add_tokens(tokenizer, recipe.add_tokens)
    meta_config = head_loading.with_head_settings(config, objectives.head_config(objective))
    outline = build_outline(recipe, folder, meta_config, objective.traits, adaptation, new_tokens, tokenizer)
    window = window_of(config, outline.virtual_tokens + outline.first_position)
    objective.bind(config, tokenizer, recipe.train.max_length or window)
    for line in adaptation.notes:
        note(line)
    return Base(
        **vars(choices), model_folder=folder, config=config, tokenizer=tokenizer, new_tokens=new_tokens,
        outline=outline, window=window,
    )  # fmt: skip


def read_rows(base: Base, note: Note) -> Prepared:
    """Read and encode the recipe's data. Raises DataError."""
    recipe, objective = base.recipe, base.objective
    streamed = any(source.streaming for source in [*recipe.data.train, *eval_sources(recipe.data).values()])
    # one process reads the network; the others find the cache that it wrote
    with distributed.main_first() if streamed else nullcontext():
        data = prepare(
            recipe.data, objective, base.tokenizer, max_length=recipe.train.max_length, seed=recipe.seed,
            window=base.window, on_progress=report_rows(note) if streamed else None,
        )  # fmt: skip
    for line in [*data.report.lines(), *objective.notes, *_new_token_notes(base.new_tokens, data)]:
        note(line)
    return data


def configure_head(base: Base, note: Note) -> Base:
    """Return the base with the head that the rows need: its labels are known now."""
    recipe, objective, folder = base.recipe, base.objective, base.model_folder
    if not (wanted := objectives.head_config(objective)):
        return base
    config, head = copy.deepcopy(base.config), objective.traits.head
    for line in head_loading.replace_head_config(config, folder, recipe.adapter, head, wanted):
        note(line)
    tokens, tokenizer = base.new_tokens, base.tokenizer
    outline = build_outline(recipe, folder, config, objective.traits, base.adaptation, tokens, tokenizer)
    return replace(base, config=config, outline=outline)


def plan_steps(base: Base, data: Prepared, steps: int | None) -> Setup:
    """Make the source of the run's steps. Raises RecipeError for a schedule that does not fit."""
    recipe, objective, train = base.recipe, base.objective, base.recipe.train
    reference = Reference() if objective.traits.needs_reference else None
    if reference is not None:
        held_out = None if data.eval is None else data.eval.attach(reference.attach)
        data = replace(data, train=data.train.attach(reference.attach), eval=held_out)
    session = RunSession(base.tokenizer, base.device, recipe.seed, _rows_in_order(base, data, steps))
    source = objective.source(session)
    processes = distributed.state().num_processes
    distributed.check_processes(processes, len(source.preview(1)[0]), "the training rows are")
    optimizers.check_schedule(train, source.plan.steps)
    return Setup(
        **vars(base), data=data, source=source, session=session, reference=reference,
        time_planned=steps is not None,
        prompts=held_out_answers.choose(recipe, data, base.tokenizer, base.window),
    )  # fmt: skip


def _rows_in_order(base: Base, data: Prepared, steps: int | None) -> Epochs:
    train = base.recipe.train
    return epochs(
        data.train, base.objective.collate, train.batch_size, base.recipe.seed, train.shuffle, train.epochs,
        steps or train.max_steps, base.objective.traits.shares_beginnings,
    )  # fmt: skip


def with_steps(setup: Setup, steps: int) -> Setup:
    """Return the setup with a source of ``steps`` steps. Raises RecipeError if no schedule can span them."""
    optimizers.check_schedule(setup.recipe.train, steps)
    setup.session.epochs = _rows_in_order(setup, setup.data, steps)
    return replace(setup, source=setup.objective.source(setup.session), time_planned=True)


@dataclass
class Built:
    """The network, adapted, cast, on its device and its fast path. ``notes`` are printed once."""

    model: PreTrainedModel
    update: Update
    noise: noise.RowNoise | None
    fast_path: fast_path.FastPath
    notes: list[str]


def build(setup: Setup, out: Path) -> Built:
    """Load and adapt the weights, make masters, cast the network, choose its fast path, make the optimiser.

    ``out``: the run folder, for a base model with an adapter merged into it.
    """
    recipe, train, deterministic = setup.recipe, setup.recipe.train, setup.objective.traits.deterministic
    torch.manual_seed(recipe.seed)  # before adapters are made: their initial values are part of the run
    model = _load_network(setup, out)
    masters = Masters(model, setup.precision.compute)
    compute_dtype.cast(model, setup.precision.compute)
    dropout_notes = noise.switch_off(model) if deterministic else []
    row_noise, noise_notes = noise.install(model, recipe.seed, train.neftune_noise_alpha)
    objective, device = setup.objective, setup.device
    first = first_examples(setup.source).examples()
    longest = max(setup.data.train.longest, setup.data.eval.longest if setup.data.eval else 0)
    if objective.traits.samples:  # the rows of the files are prompts alone
        longest = max(int(step.lengths.max()) for step in setup.source.preview(2))
    stack = setup.sharding is None
    chosen = fast_path.choose(model, objective, first, longest, train.packing, device, stack=stack)
    if not deterministic:
        fast_path.check_training_mode(chosen)
    if train.torch_compile:
        fast_path.compile_layers(chosen)
    if train.gradient_checkpointing:
        fast_path.recompute(chosen)
    if deterministic:
        fast_path.check_deterministic(chosen)
    update = _update(setup, model, masters)
    setup.session.model, setup.session.fast_path = model, chosen
    if objective.traits.keeps_start:
        setup.session.weights_at_start = WeightsAtStart(masters.parameters)
    notes = [*quantization.lines(model), *dropout_notes, *noise_notes, *chosen.notes]
    if objective.traits.samples:
        notes.append(weights_line(model, masters.masters, setup.session.weights_at_start))
    return Built(model, update, row_noise, chosen, notes)


def _load_network(setup: Setup, out: Path) -> PreTrainedModel:
    """Load the weights, adapt them, move them to the device."""
    recipe, folder, head = setup.recipe, setup.model_folder, setup.objective.traits.head
    options: dict[str, Any] = {} if recipe.device_map is None else {"device_map": recipe.device_map}
    new_head = objectives.head_config(setup.objective) or None
    if recipe.adapter == "continue":
        model = load.load_model(
            folder, head=head, adapter="attach", trainable=True, head_config=new_head, **options
        )
        probe.verify_probe(folder.path, model, load.load_tokenizer(folder))
    else:
        if recipe.adapter == "merge":
            with distributed.main_first():
                folder = _merged_base(setup, out)
        elif recipe.adapter == "new" and folder.base is not None:
            folder = replace(folder, path=folder.base, kind="full", base=None)
        options = {**setup.adaptation.load_kwargs(), **options}
        loaded = load.load_model(folder, head=head, trainable=True, head_config=new_head, **options)
        new_rows = vocabulary.grow(loaded, setup.new_tokens)
        model = setup.adaptation.apply(loaded, head, new_rows, setup.tokenizer)
    if setup.objective.traits.value_head:
        value_head.attach(model, None if recipe.adapter == "new" else setup.model_folder.path)
    if recipe.device_map is None:
        model.to(setup.device)
    else:
        device_map.check(model)
    return model


def _update(setup: Setup, model: PreTrainedModel, masters: Masters) -> Update:
    """Make the optimiser, its schedule and, in fp16, the loss scale."""
    if (sharding := setup.sharding) is None:
        masters.install_hooks()  # not earlier: the parity checks make gradients too
        return fresh_update(setup, model, masters)
    optimizer = _optimizer(setup, model, masters.parameters)
    shards = deepspeed_zero.Shards(model, optimizer, masters.masters, sharding.complete)
    return _with_schedule(setup, optimizer, shards)


def fresh_update(setup: Setup, model: PreTrainedModel, masters: TrainedWeights) -> Update:
    """Make optimiser, schedule and loss scale of a run at step 0, for weights that are not sharded."""
    return _with_schedule(setup, _optimizer(setup, model, masters.whole()), masters)


def _with_schedule(setup: Setup, optimizer: torch.optim.Optimizer, weights: TrainedWeights) -> Update:
    train = setup.recipe.train
    _, best = evaluation.deciding_figure(train, setup.objective.traits)
    schedule = optimizers.schedule(optimizer, train, setup.source.plan.steps, best)
    return Update(weights, optimizer, schedule, train.max_grad_norm, setup.recipe.seed, _loss_scale(setup))


def _optimizer(
    setup: Setup, model: PreTrainedModel, weights: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    rates = setup.adaptation.learning_rates(weights)
    return optimizers.build(weights, setup.recipe.train, lm_head.own_parameters(model), rates)


def _loss_scale(setup: Setup) -> precision.LossScale | None:
    return precision.LossScale() if setup.precision.compute is torch.float16 else None


def _note_remote_code(recipe: Recipe, folder: Folder, note: Note) -> None:
    """Print which Python files of the model will run."""
    if not recipe.trust_remote_code:
        return
    code = code_files(folder)
    if not code:
        raise RecipeError(
            f"trust_remote_code: true has no effect: {folder.path} contains no Python code. Leave the key out."
        )
    named = ", ".join(f"{file} (sha256 {files.sha256(file)[:16]})" for file in code)
    note(f"trust_remote_code: code from the model folder runs with all your rights: {named}")


def _tokenizer_folder(recipe: Recipe, folder: Folder) -> Folder:
    """Return the folder of the tokenizer: the base's where an adapter that added tokens is left out."""
    left_out = recipe.adapter == "new" and folder.base is not None and vocabulary.adapter_rows(folder.path)
    return replace(folder, path=folder.base, kind="full", base=None) if left_out and folder.base else folder


def _new_token_notes(new: vocabulary.NewTokens, data: Prepared) -> list[str]:
    """List the ids of the new tokens, and the tokens that no training row contains."""
    if not new.ids:
        return []
    lines = [f"new tokens: {', '.join(f'{token} = {number}' for token, number in new.ids.items())}"]
    wanted = np.array(list(new.ids.values()))
    seen: set[int] = set()
    for entry in data.train.entries:
        ids = entry.values["input_ids"]
        seen.update(ids[np.isin(ids, wanted)].tolist())
    unseen = [token for token, number in new.ids.items() if number not in seen]
    if unseen:
        lines.append(f"no training row contains {', '.join(unseen)}: their embeddings will not be trained")
    return lines


def _merged_base(setup: Setup, out: Path) -> Folder:
    """Merge the adapter into its base, next to the run; a new adapter records this folder as its base."""
    target = out / "base"
    if not target.is_dir():
        with torch.random.fork_rng():  # loading draws random numbers, and the other processes do not load
            # the folder's own tokenizer: the merged model does not have the new tokens of this run
            merged = merge_adapter.fold(setup.model_folder)

        def write(folder: Path) -> None:
            merge_adapter.write(merged, folder)

        size = sum(p.numel() * p.element_size() for p in merged.model.parameters())
        files.publish_folder(target, write, size)
    return locate(target, setup.model_folder.remote_code)
