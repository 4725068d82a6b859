"""The network on the meta device, without weights: counts of parameters, checks of the recipe's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunesmith.adaptations import Adaptation
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import torch_compile
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder
from tunesmith.models.heads import value_head
from tunesmith.models.load import load, merge_weights, quantization, vocabulary
from tunesmith.models.network import base, first_position
from tunesmith.objectives import Traits
from tunesmith.recipe import Recipe
from tunesmith.train import optimizers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class Outline:
    """Facts about a model that are known before its weights are loaded.

    Numbers of parameters, virtual tokens per row, the position id of a row's first token, and the weights to
    quantise."""

    trainable: int
    total: int
    virtual_tokens: int
    first_position: int
    quantized: quantization.Estimate

    def counts(self) -> dict[str, int]:
        return {"trainable": self.trainable, "total": self.total, "virtual_tokens": self.virtual_tokens}


def build_outline(
    recipe: Recipe,
    folder: Folder,
    config: PretrainedConfig,
    traits: Traits,
    adaptation: Adaptation,
    new_tokens: vocabulary.NewTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> Outline:
    """Build the adapted network on the meta device, and count. Raises RecipeError.

    ``traits``: of the objective, for the heads of the network."""
    continued = recipe.adapter == "continue"
    recorded = record.read(folder.path).get("quantization") if continued else None
    options = quantization.kwargs_from_record(recorded) if recorded else adaptation.load_kwargs()
    if continued:
        from peft import get_peft_model

        adapter = load.adapter_config(folder.path)
        adapter.inference_mode = False
        virtual_tokens.check_continued(adapter)
    with torch.device("meta"):
        model = load.empty_model(folder, config, traits.head)
        estimate = quantization.estimate(model, options)
        if continued:
            vocabulary.fit_to_adapter(model, folder.path)
            model = get_peft_model(model, adapter)
            virtual_tokens.install(model)
        else:
            if recipe.adapter == "merge":
                merge_weights.check_mergeable(load.adapter_config(folder.path))
                vocabulary.fit_to_adapter(model, folder.path)
            model = adaptation.apply(model, traits.head, vocabulary.grow(model, new_tokens), tokenizer)
        if traits.value_head:
            value_head.attach(model)
    if recipe.train.gradient_checkpointing and not base(model).supports_gradient_checkpointing:
        raise RecipeError(
            f"train.gradient_checkpointing: transformers cannot recompute the layers of {config.model_type}.\n"
            "  Leave the key out; train.micro_batch_tokens saves memory too."
        )
    if recipe.train.torch_compile and (why := torch_compile.why_not(model)) is not None:
        raise RecipeError(f"train.torch_compile: {why}, or leave train.torch_compile out.")
    optimizers.check_model(recipe.train, model)
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    return Outline(trainable, total, virtual_tokens.count(model), first_position(base(model)), estimate)


def window_of(config: PretrainedConfig, taken: int) -> int | None:
    """Return the most tokens of a row; None when the config has no limit.

    ``taken``: positions that virtual tokens take, and unused positions before the first token."""
    limits = [getattr(config, name, None) or 0 for name in WINDOWS]
    return next((int(limit) - taken for limit in limits if limit > 0), None)  # xlnet names -1
