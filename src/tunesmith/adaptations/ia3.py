"""(IA)^3: keys, values and the feed-forward's inner activation are each multiplied by a trained vector (Liu et al. 2022).

Files are peft's. peft finds the layers by a table of model types; here they are found by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import linear_layers
from tunesmith.models.heads import head_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEYS_AND_VALUES = (
    ("k_proj", "v_proj"),
    ("key", "value"),
    ("k_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
)
"""What projects to keys and values inside one attention; a fused projection is scaled whole, its queries too, as in peft."""

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Adaptation:
    traits = Traits("IA3")
    learning_rate = 1e-2
    keys_of_learning: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def load_kwargs(self) -> dict[str, Any]:
        return {}

    def apply(
        self,
        model: PreTrainedModel,
        head: str,
        new_rows: Sequence[int] = (),
        tokenizer: PreTrainedTokenizerBase = None,
    ) -> Any:
        """A peft model with exactly the vectors trainable; they begin as ones. Raises RecipeError, before the model is touched,
        when it is not clear what to scale, or when there are ``new_rows``.
        """
        from peft import IA3Config, get_peft_model

        from tunesmith.models.load import vocabulary

        if new_rows:
            raise vocabulary.no_room("ia3")
        scaled, inner = found(model)
        config = IA3Config(
            task_type=head_types.TASK[head],
            target_modules=_pattern([*scaled, *inner]),
            feedforward_modules=_pattern(inner),
            modules_to_save=head_types.new_parts(model, head) or None,
            fan_in_fan_out=linear_layers.stores_transposed(model),
        )
        return get_peft_model(model, config)

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, nothing of the base."""
        model.save_pretrained(folder, save_embedding_layers=False)


def found(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the layers whose outputs are scaled (keys, values), and of those whose inputs are (out of the feed-forward).

    Both are found in every decoder or encoder layer: the attention by its projections to keys and values; the feed-forward's way
    out as the one linear layer outside the attention that narrows what it is given to the width of the model. Raises RecipeError.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from tunesmith.models.fast import torch_compile

    blocks = torch_compile.named_layers(model)
    scaled: list[str] = []
    inner: list[str] = []
    for block, layer in blocks.items():
        layers = {
            f"{block}.{name}": one
            for name, one in layer.named_modules()
            if isinstance(one, nn.Linear | Conv1D)
        }
        attention = [name for name in layers if ATTENTION.search(name.removeprefix(block))]
        ends = {name.rpartition(".")[2]: name for name in attention}
        kind = next((kind for kind in KEYS_AND_VALUES if all(end in ends for end in kind)), ())
        out = [name for name, one in layers.items() if name not in attention and _narrows(one)]
        if not kind or len(out) != 1:
            what = "keys and values" if not kind else "the way out of the feed-forward"
            others = ", ".join(sorted(name.removeprefix(f"{block}.") for name in layers)) or "none"
            raise RecipeError(
                f"adaptation: ia3 scales keys, values and the feed-forward's inner activation, and of {type(model).__name__} it "
                f"does not know which layer makes {what}.\n  The linear layers of {block} are: {others}.\n  Use adaptation: lora."
            )
        scaled += [ends[end] for end in kind]
        inner += out
    if not blocks:
        raise RecipeError(
            f"adaptation: ia3: transformers does not say which modules of {type(model).__name__} are its layers.\n"
            "  Use adaptation: lora."
        )
    return scaled, inner


def _narrows(layer: Any) -> bool:
    """Whether a linear layer gives fewer numbers than it takes."""
    taken, given = linear_layers.widths(layer)
    return taken > given


def _pattern(names: Sequence[str]) -> str:
    """A regular expression that is exactly ``names``, whatever the number of a layer."""
    return "|".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names))
