"""From a recipe to the objects of a run: data and tokenizer first, the network's shape next, its weights last.

Whatever can be wrong is found before weights load; ``check`` stops there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith import adaptations, objectives
from tunesmith.adaptations import Adaptation
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.engine import batching, optim, precision
from tunesmith.errors import RecipeError
from tunesmith.models import load, noise, probe
from tunesmith.models.load import Folder
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe

WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass
class Setup:
    """Everything known before weights load. ``parameters``: trainable and total numbers of them."""

    recipe: Recipe
    model_folder: Folder
    config: Any
    tokenizer: Any
    objective: Objective
    adaptation: Adaptation
    data: Prepared
    plan: batching.Plan
    device: torch.device
    precision: precision.Precision
    parameters: dict[str, int]


def read(recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> Setup:
    """Check the model folder, read and encode the data, lay out the steps. Raises UserError for anything that cannot work."""
    load.quiet()
    folder = load.locate(recipe.model)
    _check_adapter_choice(recipe, folder)
    config = load.load_config(folder)
    objective = objectives.module(objectives.name_of(recipe.objective)).Objective(recipe.objective)
    adaptation = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation(recipe.adaptation)
    plan_of_numbers = precision.choose(recipe.train.precision, device)
    tokenizer = load.load_tokenizer(folder)
    parameters = _parameters(recipe, folder, config, objective, adaptation)
    data = prepare(
        recipe.data, objective, tokenizer, max_length=recipe.train.max_length, window=window_of(config), seed=recipe.seed
    )
    for line in data.report.lines():
        say(line)
    train = recipe.train
    plan = batching.plan(data.train, train.batch_size, recipe.seed, train.shuffle, train.epochs, train.max_steps)
    rate = optim.schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), train, plan.steps)
    del rate  # built once to find a schedule that cannot be, before weights load
    return Setup(recipe, folder, config, tokenizer, objective, adaptation, data, plan, device, plan_of_numbers, parameters)


def build(setup: Setup, out: Path) -> tuple[Any, optim.Masters, noise.RowNoise | None, list[str]]:
    """Load the weights, adapt them, make fp32 masters, cast the network. Also returns row-wise noise and what to say once."""
    recipe, folder = setup.recipe, setup.model_folder
    torch.manual_seed(recipe.seed)  # before adapters are made: their first values are part of the run
    if recipe.adapter == "continue":
        model = load.load_model(folder, head=setup.objective.head, adapter="attach", trainable=True)
    else:
        if recipe.adapter == "merge":
            folder = _merged_base(setup, out)
        elif recipe.adapter == "new" and folder.base is not None:
            folder = Folder(folder.base, "full")
        loaded = load.load_model(folder, head=setup.objective.head, trainable=True, **setup.adaptation.load_kwargs())
        model = setup.adaptation.apply(loaded, setup.objective.head)
    model.to(setup.device)
    masters = optim.Masters(model, setup.precision.compute)
    precision.cast(model, setup.precision.compute)
    row_noise, said = noise.install(model, recipe.seed)
    return model, masters, row_noise, said


def window_of(config: Any) -> int | None:
    """The most tokens that the network takes in one row; None when its config names no limit."""
    return next((int(value) for name in WINDOWS if (value := getattr(config, name, None))), None)


def _check_adapter_choice(recipe: Recipe, folder: Folder) -> None:
    kind = adaptations.name_of(recipe.adaptation)
    if folder.kind == "full" and recipe.adapter is not None:
        raise RecipeError(f"adapter: {recipe.adapter}: the model {recipe.model} is not an adapter. Leave the key out.")
    if folder.kind == "adapter" and recipe.adapter is None:
        raise RecipeError(
            f"the model {recipe.model} is an adapter on {folder.base}. Say what becomes of it:\n"
            "  adapter: continue (train it on), merge (fold it into its base first), or new (leave it out)."
        )
    chosen = sorted(recipe.adaptation.model_fields_set)
    if recipe.adapter == "continue" and chosen and kind != "full":
        raise RecipeError(
            f"adapter: continue keeps the adapter as it was made, so {', '.join(chosen)} under adaptation would do nothing.\n"
            f"  Write adaptation: {kind}, or start a new one with adapter: merge or adapter: new."
        )
    if recipe.adapter == "continue" and kind == "full":
        raise RecipeError("adapter: continue trains the adapter, adaptation: full trains every weight. Use adapter: merge.")


def _parameters(recipe: Recipe, folder: Folder, config: Any, objective: Objective, adaptation: Adaptation) -> dict[str, int]:
    """Numbers of parameters from the network's shape alone, which also finds modules that are not there."""
    if recipe.adapter == "continue":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig.from_pretrained(str(folder.path))
        adapter.inference_mode = False
        with torch.device("meta"):
            model = get_peft_model(_empty(config), adapter)
    else:
        with torch.device("meta"):
            model = adaptation.apply(_empty(config), objective.head)
    everything = {id(parameter): parameter for parameter in model.parameters()}.values()
    return {
        "trainable": sum(parameter.numel() for parameter in everything if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in everything),
    }


def _empty(config: Any) -> Any:
    """The network without weights (the caller is on the meta device)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _merged_base(setup: Setup, out: Path) -> Folder:
    """The adapter folded into its base, written beside the run: what a new adapter on it refers to as its base."""
    target = out / "base"
    if not target.is_dir():
        model = load.load_model(setup.model_folder, head=setup.objective.head, adapter="merge")
        from tunesmith.engine.checkpoint import publish

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            setup.tokenizer.save_pretrained(folder)
            probe.write_probe(folder, model, setup.tokenizer)

        publish(target, write, sum(p.numel() * p.element_size() for p in model.parameters()))
    return load.locate(target)
