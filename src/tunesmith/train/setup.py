"""From a recipe to the objects of a run: data and tokenizer first, the network's shape next, its weights last.

Whatever can be wrong is found before weights load; ``check`` stops there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith import adaptations, objectives
from tunesmith.adaptations import Adaptation
from tunesmith.data.read.source import eval_sources
from tunesmith.data.store.build import Progress
from tunesmith.data.store.prepare import Prepared, prepare
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import compiled, varlen
from tunesmith.models.find.locate import Folder, code_files, locate
from tunesmith.models.heads import lm_head, noise
from tunesmith.models.load import head_loading, load, probe, vocabulary
from tunesmith.models.load import quantization as quantized
from tunesmith.objectives import Example, Objective
from tunesmith.recipe import Recipe, changed
from tunesmith.train import batching, distributed, optim, placement, precision, zero
from tunesmith.train import fast_path as route
from tunesmith.train.config import TrainConfig
from tunesmith.train.masters import Masters, Trained
from tunesmith.train.update import Update

STREAM_ROWS = 10_000
"""Rows of a stream between two words about it."""

BY_LAYER = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Keys of a recipe that peft keeps in two: what holds for most layers, and what for those named."""

WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass
class Setup:
    """Everything known before weights load. ``parameters``: trainable and total numbers of them."""

    recipe: Recipe
    model_folder: Folder
    config: Any
    tokenizer: Any
    new_tokens: vocabulary.NewTokens
    objective: Objective
    adaptation: Adaptation
    data: Prepared
    plan: batching.Plan
    device: torch.device
    precision: precision.Precision
    parameters: dict[str, int]
    quantized: quantized.Estimate
    """Of the base, what will be kept in 4 or 8 bits."""
    sharding: zero.Sharding | None = None
    """DeepSpeed's configuration, where it is used."""


def read(recipe: Recipe, device: torch.device, say: Callable[[str], None], deepspeed: Path | None = None) -> Setup:
    """Check the model folder, read and encode the data, lay out the steps. ``deepspeed``: a ds_config.json.

    Raises UserError for anything that cannot work.
    """
    load.quiet()
    processes = distributed.state().num_processes
    batching.check_processes(processes, recipe.train.batch_size, "train.batch_size is")
    device = placement.device_of(recipe.device_map, device)
    folder = locate(recipe.model, recipe.trust_remote_code)
    _check_adapter_choice(recipe, folder)
    _name_code(recipe, folder, say)
    config = load.load_config(folder)
    objective = objectives.module(objectives.name_of(recipe.objective)).Objective(recipe.objective)
    head_loading.inherit(config, folder, recipe.adapter, objective.head)
    adaptation = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation(recipe.adaptation)
    if deepspeed is not None and "quantization_config" in adaptation.load_kwargs():
        raise RecipeError(
            "--deepspeed does not go with a base in 4 or 8 bits, which nothing shows to be right. Leave one of them out."
        )
    optim.check(recipe.train)
    numbers = precision.choose(recipe.train.precision, device, recipe.train.optim_name)
    sharded = None if deepspeed is None else zero.read(deepspeed, recipe.train, numbers.compute)
    tokenizer = load.load_tokenizer(_tokenizer_folder(recipe, folder))
    new_tokens = vocabulary.add_tokens(tokenizer, recipe.add_tokens)
    _check_compile(recipe.train, device, numbers.compute)
    shape = head_loading.outlined(config, objective.head_config())
    parameters, kept = _parameters(recipe, folder, shape, objective, adaptation, new_tokens, tokenizer)
    window = window_of(config, parameters["virtual_tokens"])
    objective.adopt(config, tokenizer, recipe.train.max_length or window)
    for line in adaptation.notes:
        say(line)
    streamed = any(source.streaming for source in [*recipe.data.train, *eval_sources(recipe.data).values()])
    with distributed.main_first() if streamed else nullcontext():  # one process asks the network, the others find the cache
        data = prepare(
            recipe.data, objective, tokenizer, max_length=recipe.train.max_length, seed=recipe.seed,
            window=window,
            on_progress=_rows_read(say) if streamed else None,
        )  # fmt: skip
    for line in [*data.report.lines(), *objective.notes, *_about(new_tokens, data)]:
        say(line)
    if new_head := objective.head_config():  # its size is known now
        for line in head_loading.change(config, folder, recipe.adapter, objective.head, new_head):
            say(line)
        parameters, kept = _parameters(recipe, folder, config, objective, adaptation, new_tokens, tokenizer)
    train = recipe.train
    plan = batching.plan(data.train, train.batch_size, recipe.seed, train.shuffle, train.epochs, train.max_steps)
    batching.check_processes(processes, len(plan.rows(1)), "the rows to learn from are")
    rate = optim.schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), train, plan.steps)
    del rate  # built once to find a schedule that cannot be, before weights load
    return Setup(
        recipe, folder, config, tokenizer, new_tokens, objective, adaptation, data, plan, device, numbers, parameters,
        kept, sharded,
    )  # fmt: skip


def _rows_read(say: Callable[[str], None]) -> Progress:
    """Says how far a stream is, every ten thousand rows: nobody knows how many there will be."""
    said: dict[str, int] = {}

    def count(label: str, rows: int) -> None:
        if rows // STREAM_ROWS > said.get(label, 0):
            said[label] = rows // STREAM_ROWS
            say(f"{label}: {rows:,} rows read")

    return count


@dataclass
class Built:
    """The network, ready to be trained: adapted, cast, on its device and its route. ``notes`` are to be said once."""

    model: Any
    update: Update
    noise: noise.RowNoise | None
    route: route.Route
    notes: list[str]


def build(setup: Setup, out: Path) -> Built:
    """Load the weights, adapt them, make fp32 masters, cast the network, find its route, make the optimiser."""
    recipe, folder, train = setup.recipe, setup.model_folder, setup.recipe.train
    torch.manual_seed(recipe.seed)  # before adapters are made: their first values are part of the run
    placed: dict[str, Any] = {} if recipe.device_map is None else {"device_map": recipe.device_map}
    new_head = setup.objective.head_config() or None
    if recipe.adapter == "continue":
        model = load.load_model(
            folder, head=setup.objective.head, adapter="attach", trainable=True, head_config=new_head, **placed
        )
        probe.verify_probe(folder.path, model, load.load_tokenizer(folder))
    else:
        if recipe.adapter == "merge":
            with distributed.main_first():
                folder = _merged_base(setup, out)
        elif recipe.adapter == "new" and folder.base is not None:
            folder = replace(folder, path=folder.base, kind="full", base=None)
        options = {**setup.adaptation.load_kwargs(), **placed}
        loaded = load.load_model(folder, head=setup.objective.head, trainable=True, head_config=new_head, **options)
        new_rows = vocabulary.grow(loaded, setup.new_tokens)
        model = setup.adaptation.apply(loaded, setup.objective.head, new_rows, setup.tokenizer)
    if recipe.device_map is None:
        model.to(setup.device)
    else:
        placement.check(model)
    masters: Trained
    masters = whole = Masters(model, setup.precision.compute)
    precision.cast(model, setup.precision.compute)
    switched_off = noise.switch_off(model) if setup.objective.deterministic else []
    row_noise, said = noise.install(model, recipe.seed, train.neftune_noise_alpha)
    chosen = route.choose(
        model, setup.objective, _first(setup), _longest(setup.data), train.packing, setup.device, stack=setup.sharding is None
    )
    if train.torch_compile:
        route.compile_layers(model, setup.objective, _first(setup), chosen, setup.device)
    if train.gradient_checkpointing:
        route.recompute(model, setup.objective, _first(setup), chosen, setup.device)
    if setup.objective.deterministic:
        route.check_still(model, setup.objective, _first(setup), chosen, setup.device)
    trained = whole.masters if setup.sharding is None else whole.parameters
    optimizer = optim.build(trained, train, lm_head.own_parameters(model), setup.adaptation.learning_rates(trained))
    if setup.sharding is None:
        whole.listen()
    else:
        masters = zero.Shards(model, optimizer, whole.masters, setup.sharding.complete)
    schedule = optim.schedule(optimizer, train, setup.plan.steps)
    scale = precision.LossScale() if setup.precision.compute is torch.float16 else None
    update = Update(masters, optimizer, schedule, train.max_grad_norm, recipe.seed, scale)
    return Built(model, update, row_noise, chosen, [*quantized.lines(model), *switched_off, *said, *chosen.notes])


def _first(setup: Setup) -> list[Example]:
    """The two shortest rows of the first step: the route is tried on them."""
    lengths = setup.data.train.lengths
    rows = sorted(setup.plan.rows(1), key=lambda row: (lengths[row], row))
    return [setup.data.train[int(row)] for row in rows[:2]]


def _longest(data: Prepared) -> int:
    return max(data.train.longest, data.eval.longest if data.eval else 0)


def window_of(config: Any, ahead: int = 0) -> int | None:
    """The most tokens that the network takes in one row, with so many virtual ones ``ahead``; None when it names no limit."""
    taken = ahead + lm_head.first_position(config)
    return next((int(value) - taken for name in WINDOWS if (value := getattr(config, name, None))), None)


def _check_adapter_choice(recipe: Recipe, folder: Folder) -> None:
    kind = adaptations.name_of(recipe.adaptation)
    if folder.kind == "full" and recipe.adapter is not None:
        raise RecipeError(f"adapter: {recipe.adapter}: the model {recipe.model} is not an adapter. Leave the key out.")
    if folder.kind == "adapter" and recipe.adapter is None:
        raise RecipeError(
            f"the model {recipe.model} is an adapter on {folder.base}. Say what becomes of it:\n"
            "  adapter: continue (train it on), merge (fold it into its base first), or new (leave it out)."
        )
    whole = kind in ("full", "features")
    if recipe.adapter == "continue" and not whole:
        saved = load.adapter_config(folder.path)
        made = load.KINDS.get(str(getattr(saved.peft_type, "value", saved.peft_type)), "of another kind")
        if made != kind.removeprefix("q"):
            raise RecipeError(
                f"adapter: continue: this adapter is {made}, and adaptation: {kind} would learn at another's rate and keys.\n"
                f"  Take adaptation: {made}, or start a new one with adapter: merge or adapter: new."
            )
        recorded = probe.read(folder.path).get("quantization") or {}
        asked = "quantization_config" in adaptations.module(kind).Adaptation(recipe.adaptation).load_kwargs()
        if asked != bool(recorded):
            base = f"in {recorded['quant_type']}" if recorded else "as it is"
            raise RecipeError(
                f"adapter: continue: this adapter was trained on its base {base}, and adaptation: {kind} has another.\n"
                f"  Take adaptation: {'qlora' if recorded else 'lora'}, or start a new one with adapter: merge or adapter: new."
            )
        keys = set(type(recipe.adaptation).model_fields) - adaptations.module(kind).Adaptation.keys_of_learning
        chosen = sorted(key for key in keys if changed(recipe.adaptation, key))  # a run's own recipe.yaml holds every default
        made_with = keys_that_made(recipe, folder) or {}
        other = [
            f"{key} (it has {was})" for key in chosen if (was := _made_otherwise(recipe, key, saved, {**recorded, **made_with}))
        ]
        if other:
            raise RecipeError(
                f"adapter: continue keeps the adapter as it was made, and adaptation names another {', '.join(other)}.\n"
                "  Leave out those keys, or start a new one with adapter: merge or adapter: new."
            )
    if recipe.adapter == "continue" and whole:
        raise RecipeError(
            f"adapter: continue trains the adapter, adaptation: {kind} trains the model's own weights. Use adapter: merge."
        )


def keys_that_made(recipe: Recipe, folder: Folder) -> dict[str, Any] | None:
    """The adaptation, with its keys, that made what a run of ``recipe`` saves: of an adapter that is continued, its first one.

    peft's config does not always tell: a PiSSA of rank r is saved as a plain LoRA of rank 2 r. None for an adapter without a
    record.
    """
    if recipe.adapter == "continue":
        return probe.read(folder.path).get("adaptation")
    return {"type": adaptations.name_of(recipe.adaptation), **recipe.adaptation.model_dump(mode="json")}


def _made_otherwise(recipe: Recipe, key: str, saved: Any, recorded: Mapping[str, Any]) -> str | None:
    """What the ``saved`` adapter has of a key of the recipe, if that is another. What is ``recorded`` of it goes first."""
    wanted, has = getattr(recipe.adaptation, key), recorded.get(key, getattr(saved, key, None))
    if key not in recorded and (others := getattr(saved, BY_LAYER.get(key, ""), None)):
        has = {"default": has, **others}
    if isinstance(has, set | list):
        has, wanted = sorted(has), sorted(wanted) if isinstance(wanted, list) else wanted
    return None if wanted == has or (not wanted and not has) else f"{has}"


def _name_code(recipe: Recipe, folder: Folder, say: Callable[[str], None]) -> None:
    """Say which files of the model will be run."""
    if not recipe.trust_remote_code:
        return
    files = code_files(folder)
    if not files:
        raise RecipeError("trust_remote_code: true does nothing: this model brings no code of its own. Leave it out.")
    named = ", ".join(f"{file} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]})" for file in files)
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
    if train.packing == "auto" and route.packed_attention(device, dtype) != "varlen":
        raise RecipeError(
            f"train.torch_compile: packed rows go through attention one by one here ({varlen.why_not(device, dtype)}), so every "
            "packing would be compiled anew.\n  Set train.packing: off, or leave train.torch_compile out."
        )


def _parameters(
    recipe: Recipe,
    folder: Folder,
    config: Any,
    objective: Objective,
    adaptation: Adaptation,
    new_tokens: vocabulary.NewTokens,
    tokenizer: Any,
) -> tuple[dict[str, int], quantized.Estimate]:
    """Numbers of parameters from the network's shape alone, which also finds modules that are not there."""
    recorded = probe.read(folder.path).get("quantization") if recipe.adapter == "continue" else None
    options = quantized.of_record(recorded) if recorded else adaptation.load_kwargs()
    if recipe.adapter == "continue":
        from peft import get_peft_model

        adapter = load.adapter_config(folder.path)
        adapter.inference_mode = False
        virtual_tokens.check_continued(adapter)
        with torch.device("meta"):
            model = load.empty_model(folder, config, objective.head)
            kept = quantized.estimate(model, options)
            vocabulary.fit_to_adapter(model, folder.path)
            model = get_peft_model(model, adapter)
            virtual_tokens.install(model)
    else:
        with torch.device("meta"):
            model = load.empty_model(folder, config, objective.head)
            kept = quantized.estimate(model, options)
            if recipe.adapter == "merge":
                load.check_mergeable(load.adapter_config(folder.path))
                vocabulary.fit_to_adapter(model, folder.path)
            model = adaptation.apply(model, objective.head, vocabulary.grow(model, new_tokens), tokenizer)
    if recipe.train.gradient_checkpointing and not lm_head.base(model).supports_gradient_checkpointing:
        raise RecipeError(
            f"train.gradient_checkpointing: transformers cannot recompute the layers of {config.model_type}.\n"
            "  Leave the key out; train.micro_batch_tokens saves memory too."
        )
    if recipe.train.torch_compile and (why := compiled.why_not(model)) is not None:
        raise RecipeError(f"train.torch_compile: {why}, or leave train.torch_compile out.")
    optim.check_model(recipe.train, model)
    everything = {id(parameter): parameter for parameter in model.parameters()}.values()
    counts = {
        "trainable": sum(parameter.numel() for parameter in everything if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in everything),
        "virtual_tokens": virtual_tokens.count(model),
    }
    return counts, kept


def _merged_base(setup: Setup, out: Path) -> Folder:
    """The adapter folded into its base, written beside the run: what a new adapter on it refers to as its base."""
    target = out / "base"
    if not target.is_dir():
        from tunesmith.merge import run as merge
        from tunesmith.train.checkpoint import publish

        with torch.random.fork_rng():  # loading draws numbers, and the other processes do not load
            folded = merge.fold(
                setup.model_folder
            )  # its tokenizer is without this run's new tokens, which the sum knows nothing of

        def write(folder: Path) -> None:
            merge.write(folded, folder)

        publish(target, write, sum(p.numel() * p.element_size() for p in folded.plain.parameters()))
    return locate(target, setup.model_folder.remote_code)
