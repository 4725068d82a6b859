"""The network's shape without its weights: counts of parameters, and modules that the recipe names and that are not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.adaptations import Adaptation
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import torch_compile
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder
from tunesmith.models.load import load, quantization, vocabulary
from tunesmith.models.network import base, first_position
from tunesmith.recipe import Recipe
from tunesmith.train import optimizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class Outline:
    """``trainable`` and ``total`` numbers of parameters; ``virtual_tokens`` in front of each row; what will be kept in 4 or 8
    bits (``quantized``)."""

    trainable: int
    total: int
    virtual_tokens: int
    quantized: quantization.Estimate

    def counts(self) -> dict[str, int]:
        return {"trainable": self.trainable, "total": self.total, "virtual_tokens": self.virtual_tokens}


def outline(
    recipe: Recipe,
    folder: Folder,
    config: Any,
    head: str,
    adaptation: Adaptation,
    new_tokens: vocabulary.NewTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> Outline:
    """Build the adapted network on the meta device, with a ``head`` of that kind, and count. Raises RecipeError."""
    recorded = record.read(folder.path).get("quantization") if recipe.adapter == "continue" else None
    options = quantization.kwargs_from_record(recorded) or adaptation.load_kwargs()
    if recipe.adapter == "continue":
        from peft import get_peft_model

        adapter = load.adapter_config(folder.path)
        adapter.inference_mode = False
        virtual_tokens.check_continued(adapter)
        with torch.device("meta"):
            model = load.empty_model(folder, config, head)
            kept = quantization.estimate(model, options)
            vocabulary.fit_to_adapter(model, folder.path)
            model = get_peft_model(model, adapter)
            virtual_tokens.install(model)
    else:
        with torch.device("meta"):
            model = load.empty_model(folder, config, head)
            kept = quantization.estimate(model, options)
            if recipe.adapter == "merge":
                load.check_mergeable(load.adapter_config(folder.path))
                vocabulary.fit_to_adapter(model, folder.path)
            model = adaptation.apply(model, head, vocabulary.grow(model, new_tokens), tokenizer)
    if recipe.train.gradient_checkpointing and not base(model).supports_gradient_checkpointing:
        raise RecipeError(
            f"train.gradient_checkpointing: transformers cannot recompute the layers of {config.model_type}.\n"
            "  Leave the key out; train.micro_batch_tokens saves memory too."
        )
    if recipe.train.torch_compile and (why := torch_compile.why_not(model)) is not None:
        raise RecipeError(f"train.torch_compile: {why}, or leave train.torch_compile out.")
    optimizers.check_model(recipe.train, model)
    everything = {id(parameter): parameter for parameter in model.parameters()}.values()
    trainable = sum(parameter.numel() for parameter in everything if parameter.requires_grad)
    return Outline(
        trainable, sum(parameter.numel() for parameter in everything), virtual_tokens.count(model), kept
    )


def window_of(config: Any, ahead: int = 0) -> int | None:
    """The most tokens that the network takes in one row, with so many virtual ones ``ahead``; None when it names no limit."""
    taken = ahead + first_position(config)
    return next((int(value) - taken for name in WINDOWS if (value := getattr(config, name, None))), None)
