"""(IA)^3: keys, values and the feed-forward's inner activation are each multiplied by a trained vector (Liu
et al. 2022).

Files are in peft's format. peft finds the layers by a table of model types; this module recognises them by
name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import linear_layers
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns, vocabulary

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

KEYS_AND_VALUES = (
    ("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("c_attn",), ("query_key_value",), ("qkv_proj",),
)  # fmt: skip
"""Projections to keys and values. A fused projection is scaled whole, queries included, as in peft."""

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Config(adaptations.Config):
    pass


class Adaptation(adaptations.Adaptation):
    traits = Traits("IA3")
    learning_rate = 1e-2

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return a peft model with exactly the vectors trainable; they start at one. Raises RecipeError,
        before the model is changed, when the layers are not recognised or when there are ``new_rows``."""
        from peft import IA3Config, get_peft_model

        if new_rows:
            raise vocabulary.no_room("ia3")
        outer, inner = find_layers(model)
        config = IA3Config(
            task_type=head_types.TASK[head],
            target_modules=module_patterns.in_any_layer([*outer, *inner]),
            feedforward_modules=module_patterns.in_any_layer(inner),
            modules_to_save=head_types.new_parts(model, head) or None,
            fan_in_fan_out=linear_layers.stores_transposed(model),
        )
        return get_peft_model(model, config)


def find_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the layers whose outputs are scaled (keys, values), and of those whose inputs are scaled (the
    feed-forward's output projection).

    Both must be found in every decoder or encoder layer: the attention by its projections to keys and values,
    the feed-forward's output projection as the only linear layer outside the attention with fewer outputs
    than inputs. Raises RecipeError.
    """
    from tunesmith.models.fast import torch_compile

    blocks = torch_compile.named_layers(model)
    if not blocks:
        raise RecipeError(
            f"adaptation: ia3: transformers does not say which modules of {type(model).__name__} are its layers.\n"
            "  Use adaptation: lora."
        )
    outer: list[str] = []
    inner: list[str] = []
    for block, layer in blocks.items():
        linear = _linear_layers(block, layer)
        attention = [name for name in linear if ATTENTION.search(name.removeprefix(block))]
        by_end = {name.rpartition(".")[2]: name for name in attention}
        projections = next((ends for ends in KEYS_AND_VALUES if all(end in by_end for end in ends)), ())
        outputs = [name for name, module in linear.items() if name not in attention and _narrows(module)]
        if not projections or len(outputs) != 1:
            missing = "the feed-forward's output" if projections else "keys and values"
            others = ", ".join(sorted(name.removeprefix(f"{block}.") for name in linear)) or "none"
            raise RecipeError(
                f"adaptation: ia3 scales keys, values and the feed-forward's inner activation, but the layer of "
                f"{type(model).__name__} that computes {missing} is not recognised.\n"
                f"  The linear layers of {block} are: {others}.\n  Use adaptation: lora."
            )
        outer += [by_end[end] for end in projections]
        inner += outputs
    return outer, inner


def _linear_layers(block: str, layer: nn.Module) -> dict[str, nn.Module]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {f"{block}.{name}": module for name, module in layer.named_modules()}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}


def _narrows(layer: nn.Module) -> bool:
    inputs, outputs = linear_layers.widths(layer)
    return inputs > outputs
