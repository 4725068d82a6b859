"""From a recipe to the objects of a run, as a chain: choices, base model, rows, network.

Each link's type says what is known after it. Whatever can be wrong is found before weights load; ``check`` stops there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from tunesmith.data.store.encode_source import Progress
from tunesmith.data.store.epochs import epochs
from tunesmith.data.store.prepare import Prepared, prepare
from tunesmith.errors import RecipeError
from tunesmith.models.fast import varlen
from tunesmith.models.find.locate import Folder, code_files, locate
from tunesmith.models.heads import lm_head, noise
from tunesmith.models.load import head_loading, load, probe, quantization, vocabulary
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.train import (
    adapter_choice,
    deepspeed_zero,
    device_map,
    distributed,
    fast_path,
    optimizers,
    precision,
)
from tunesmith.train.master_weights import Masters, Trained
from tunesmith.train.meta_model import Outline, outline, window_of
from tunesmith.train.reference import Reference
from tunesmith.train.session import RunSession
from tunesmith.train.train_config import TrainConfig
from tunesmith.train.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STREAM_ROWS = 10_000
"""Report progress of a stream every this many rows."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Choices:
    """What the recipe and the machine decide alone. ``sharding``: DeepSpeed's configuration, where it is used."""

    recipe: Recipe
    objective: Objective
    adaptation: Adaptation
    device: torch.device
    precision: precision.Precision
    sharding: deepspeed_zero.Sharding | None


@dataclass(frozen=True)
class Base:
    """The base model before its weights: its folder, its config with the head it was saved with, the tokenizer with the
    recipe's new tokens, the network's outline, and the most tokens of a row (``window``, None = no limit)."""

    folder: Folder
    config: Any
    tokenizer: PreTrainedTokenizerBase
    new_tokens: vocabulary.NewTokens
    outline: Outline
    window: int | None


@dataclass(frozen=True)
class Setup:
    """Everything known before weights load: choices, base model with the head that the rows ask for, data, and the source of
    the run's steps."""

    recipe: Recipe
    model_folder: Folder
    config: Any
    tokenizer: PreTrainedTokenizerBase
    new_tokens: vocabulary.NewTokens
    objective: Objective
    adaptation: Adaptation
    data: Prepared
    source: Source
    session: RunSession
    reference: Reference | None
    """What the policy gives before its first step, where the objective compares with it."""
    device: torch.device
    precision: precision.Precision
    outline: Outline
    sharding: deepspeed_zero.Sharding | None = None

    def seen(self) -> list[Step]:
        """Every example that a step or an evaluation takes, each once; without those that are sampled."""
        steps = [self.source.distinct()]
        if self.data.eval is not None:
            steps.append(Step(0, self.data.eval, np.arange(len(self.data.eval)), self.objective.collate))
        return [step for step in steps if step is not None]


def read(recipe: Recipe, device: torch.device, say: Say, deepspeed: Path | None = None) -> Setup:
    """Check the recipe and the model folder, read and encode the data, lay out the steps. ``deepspeed``: a ds_config.json.

    Raises UserError for anything that cannot work.
    """
    load.quiet()
    choices = choose(recipe, device, deepspeed)
    base = open_base(choices, say)
    data = read_rows(choices, base, say)
    config, shape = with_head(choices, base, say)
    return lay_out(choices, replace(base, config=config, outline=shape), data)


def choose(recipe: Recipe, device: torch.device, deepspeed: Path | None) -> Choices:
    """Decide on device, number formats and shards. Raises RecipeError for choices that exclude each other."""
    distributed.check_processes(
        distributed.state().num_processes, recipe.train.batch_size, "train.batch_size is"
    )
    device = device_map.device_of(recipe.device_map, device)
    objective = objectives.module(objectives.name_of(recipe.objective)).Objective(recipe.objective)
    adaptation = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation(recipe.adaptation)
    if deepspeed is not None and "quantization_config" in adaptation.load_kwargs():
        raise RecipeError(
            "--deepspeed does not go with a base in 4 or 8 bits, which nothing shows to be right. Leave one of them out."
        )
    optimizers.check(recipe.train)
    numbers = precision.choose(recipe.train.precision, device, recipe.train.optim_name)
    sharding = None if deepspeed is None else deepspeed_zero.read(deepspeed, recipe.train, numbers.compute)
    _check_compile(recipe.train, device, numbers.compute)
    return Choices(recipe, objective, adaptation, device, numbers, sharding)


def open_base(choices: Choices, say: Say) -> Base:
    """Find the base model and tell the objective of it. Raises UserError for a model that the recipe cannot train."""
    recipe, objective, adaptation = choices.recipe, choices.objective, choices.adaptation
    folder = locate(recipe.model, recipe.trust_remote_code)
    adapter_choice.check(recipe, folder)
    _name_code(recipe, folder, say)
    config = load.load_config(folder)
    head_loading.inherit_head_config(config, folder, recipe.adapter, objective.traits.head)
    tokenizer = load.load_tokenizer(_tokenizer_folder(recipe, folder))
    new_tokens = vocabulary.add_tokens(tokenizer, recipe.add_tokens)
    sketched = head_loading.with_head_settings(config, objectives.head_config(objective))
    shape = outline(recipe, folder, sketched, objective.traits.head, adaptation, new_tokens, tokenizer)
    window = window_of(config, shape.virtual_tokens)
    objective.bind(config, tokenizer, recipe.train.max_length or window)
    for line in adaptation.notes:
        say(line)
    return Base(folder, config, tokenizer, new_tokens, shape, window)


def read_rows(choices: Choices, base: Base, say: Say) -> Prepared:
    """Read and encode the recipe's data. Raises DataError."""
    recipe, objective = choices.recipe, choices.objective
    streamed = any(source.streaming for source in [*recipe.data.train, *eval_sources(recipe.data).values()])
    with (
        distributed.main_first() if streamed else nullcontext()
    ):  # one process asks the network, the others find the cache
        data = prepare(
            recipe.data, objective, base.tokenizer, max_length=recipe.train.max_length, seed=recipe.seed,
            window=base.window,
            on_progress=_rows_read(say) if streamed else None,
        )  # fmt: skip
    for line in [*data.report.lines(), *objective.notes, *_about(base.new_tokens, data)]:
        say(line)
    return data


def with_head(choices: Choices, base: Base, say: Say) -> tuple[Any, Outline]:
    """(the config with the head that the rows ask for, the network's outline with it): its labels are known now."""
    recipe, objective = choices.recipe, choices.objective
    if not (wanted := objectives.head_config(objective)):
        return base.config, base.outline
    config = copy.deepcopy(base.config)
    for line in head_loading.replace_head_config(
        config, base.folder, recipe.adapter, objective.traits.head, wanted
    ):
        say(line)
    head, adaptation = objective.traits.head, choices.adaptation
    return config, outline(recipe, base.folder, config, head, adaptation, base.new_tokens, base.tokenizer)


def lay_out(choices: Choices, base: Base, data: Prepared) -> Setup:
    """Make the source of the run's steps. Raises RecipeError for a schedule that does not suit them."""
    recipe, objective, train = choices.recipe, choices.objective, choices.recipe.train
    reference = Reference() if objective.traits.needs_reference else None
    if reference is not None:
        held_out = None if data.eval is None else data.eval.attach(reference.attach)
        data = replace(data, train=data.train.attach(reference.attach), eval=held_out)
    rows = epochs(
        data.train,
        objective.collate,
        train.batch_size,
        recipe.seed,
        train.shuffle,
        train.epochs,
        train.max_steps,
    )
    session = RunSession(base.tokenizer, choices.device, recipe.seed, rows)
    source = objective.source(session)
    distributed.check_processes(
        distributed.state().num_processes, len(source.preview(1)[0]), "the rows to learn from are"
    )
    optimizers.check_schedule(train, source.plan.steps)
    return Setup(
        recipe, base.folder, base.config, base.tokenizer, base.new_tokens, objective, choices.adaptation, data, source,
        session, reference, choices.device, choices.precision, base.outline, choices.sharding,
    )  # fmt: skip


def _rows_read(say: Say) -> Progress:
    """Report how far a stream is: nobody knows how many rows there will be."""
    reported: dict[str, int] = {}

    def count(label: str, rows: int) -> None:
        if rows // STREAM_ROWS > reported.get(label, 0):
            reported[label] = rows // STREAM_ROWS
            say(f"{label}: {rows:,} rows read")

    return count


@dataclass
class Built:
    """The network, ready to be trained: adapted, cast, on its device and its route. ``notes`` are to be said once."""

    model: PreTrainedModel
    update: Update
    noise: noise.RowNoise | None
    route: fast_path.Route
    notes: list[str]


def build(setup: Setup, out: Path) -> Built:
    """Load the weights, adapt them, make fp32 masters, cast the network, find its route, make the optimiser."""
    recipe, folder, train = setup.recipe, setup.model_folder, setup.recipe.train
    torch.manual_seed(recipe.seed)  # before adapters are made: their first values are part of the run
    placed: dict[str, Any] = {} if recipe.device_map is None else {"device_map": recipe.device_map}
    new_head = objectives.head_config(setup.objective) or None
    if recipe.adapter == "continue":
        model = load.load_model(
            folder,
            head=setup.objective.traits.head,
            adapter="attach",
            trainable=True,
            head_config=new_head,
            **placed,
        )
        probe.verify_probe(folder.path, model, load.load_tokenizer(folder))
    else:
        if recipe.adapter == "merge":
            with distributed.main_first():
                folder = _merged_base(setup, out)
        elif recipe.adapter == "new" and folder.base is not None:
            folder = replace(folder, path=folder.base, kind="full", base=None)
        options = {**setup.adaptation.load_kwargs(), **placed}
        loaded = load.load_model(
            folder, head=setup.objective.traits.head, trainable=True, head_config=new_head, **options
        )
        new_rows = vocabulary.grow(loaded, setup.new_tokens)
        model = setup.adaptation.apply(loaded, setup.objective.traits.head, new_rows, setup.tokenizer)
    if recipe.device_map is None:
        model.to(setup.device)
    else:
        device_map.check(model)
    masters: Trained
    masters = whole = Masters(model, setup.precision.compute)
    precision.cast(model, setup.precision.compute)
    switched_off = noise.switch_off(model) if setup.objective.traits.deterministic else []
    row_noise, said = noise.install(model, recipe.seed, train.neftune_noise_alpha)
    first = first_examples(setup.source).examples()
    chosen = fast_path.choose(
        model,
        setup.objective,
        first,
        _longest(setup.data),
        train.packing,
        setup.device,
        stack=setup.sharding is None,
    )
    if train.torch_compile:
        fast_path.compile_layers(model, setup.objective, first, chosen, setup.device)
    if train.gradient_checkpointing:
        fast_path.recompute(model, setup.objective, first, chosen, setup.device)
    if setup.objective.traits.deterministic:
        fast_path.check_still(model, setup.objective, first, chosen, setup.device)
    trained = whole.masters if setup.sharding is None else whole.parameters
    optimizer = optimizers.build(
        trained, train, lm_head.own_parameters(model), setup.adaptation.learning_rates(trained)
    )
    if setup.sharding is None:
        whole.listen()
    else:
        masters = deepspeed_zero.Shards(model, optimizer, whole.masters, setup.sharding.complete)
    schedule = optimizers.schedule(optimizer, train, setup.source.plan.steps)
    scale = precision.LossScale() if setup.precision.compute is torch.float16 else None
    update = Update(masters, optimizer, schedule, train.max_grad_norm, recipe.seed, scale)
    setup.session.model, setup.session.route = model, chosen
    return Built(
        model, update, row_noise, chosen, [*quantization.lines(model), *switched_off, *said, *chosen.notes]
    )


def _longest(data: Prepared) -> int:
    return max(data.train.longest, data.eval.longest if data.eval else 0)


def _name_code(recipe: Recipe, folder: Folder, say: Say) -> None:
    """Say which files of the model will be run."""
    if not recipe.trust_remote_code:
        return
    code = code_files(folder)
    if not code:
        raise RecipeError(
            "trust_remote_code: true does nothing: this model brings no code of its own. Leave it out."
        )
    named = ", ".join(f"{file} (sha256 {files.sha256(file)[:16]})" for file in code)
    say(f"trust_remote_code: code that came with the model runs with all your rights: {named}")


def _tokenizer_folder(recipe: Recipe, folder: Folder) -> Folder:
    """Where the tokenizer comes from: an adapter that is left out takes the tokens it added with it."""
    left_out = recipe.adapter == "new" and folder.base is not None and vocabulary.adapter_rows(folder.path)
    return replace(folder, path=folder.base, kind="full", base=None) if left_out and folder.base else folder


def _about(new: vocabulary.NewTokens, data: Prepared) -> list[str]:
    """The ids of the new tokens, and which of them no training row holds: those will not be learnt."""
    if not new.ids:
        return []
    said = [f"new tokens: {', '.join(f'{token} = {number}' for token, number in new.ids.items())}"]
    wanted = np.array(list(new.ids.values()))
    seen: set[int] = set()
    for entry in data.train.entries:
        ids = entry.values["input_ids"]
        seen.update(ids[np.isin(ids, wanted)].tolist())
    unseen = [token for token, number in new.ids.items() if number not in seen]
    if unseen:
        said.append(f"no training row holds {', '.join(unseen)}: nothing will be learnt of it")
    return said


def _check_compile(train: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """What compiled layers could not be, or would only cost."""
    if not train.torch_compile:
        return
    if device.type != "cuda":
        raise RecipeError(
            f"train.torch_compile is for GPUs, and this run is on a {device.type} device. On a CPU compiling takes half "
            "a minute, needs padded rows, and gives layers that are as fast as ours at best.\n  Leave train.torch_compile out."
        )
    if train.packing == "auto" and fast_path.packed_attention(device, dtype) != "varlen":
        raise RecipeError(
            f"train.torch_compile: packed rows go through attention one by one here ({varlen.why_not(device, dtype)}), so every "
            "packing would be compiled anew.\n  Set train.packing: off, or leave train.torch_compile out."
        )


def _merged_base(setup: Setup, out: Path) -> Folder:
    """The adapter folded into its base, written beside the run: what a new adapter on it refers to as its base."""
    target = out / "base"
    if not target.is_dir():
        from tunesmith.merge import merge_adapter as merge

        with torch.random.fork_rng():  # loading draws numbers, and the other processes do not load
            folded = merge.fold(
                setup.model_folder
            )  # its tokenizer is without this run's new tokens, which the sum knows nothing of

        def write(folder: Path) -> None:
            merge.write(folded, folder)

        files.publish_folder(
            target, write, sum(p.numel() * p.element_size() for p in folded.model.parameters())
        )
    return locate(target, setup.model_folder.remote_code)
