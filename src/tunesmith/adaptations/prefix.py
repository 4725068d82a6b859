"""Prefix tuning: trained keys and values in front of every row, in every layer (Li and Liang 2021). Files are peft's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.adaptations import Traits
from tunesmith.models.heads import head_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROJECTION_RATIO = 0.01


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_virtual_tokens: int = Field(
        20, gt=0, description="trained keys and values in front of each row, in each layer"
    )
    prefix_projection: bool = Field(
        False, description="make them by a small network while training (section 4.3 of the paper)"
    )
    encoder_hidden_size: int | None = Field(
        None, gt=0, description="width of that network; default: that of all key heads"
    )

    @model_validator(mode="after")
    def _width_of_something(self) -> Config:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                "encoder_hidden_size is the width of the network that prefix_projection: true makes: give both"
            )
        return self


class Adaptation:
    traits = Traits("PREFIX_TUNING")
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
        """A peft model with only the prefix trainable. Raises RecipeError or ModelError before the model is touched."""
        from peft import PrefixTuningConfig, get_peft_model

        from tunesmith.models.adapters import virtual_tokens
        from tunesmith.models.load import vocabulary

        if new_rows:
            raise vocabulary.no_room("prefix")
        tokens = self.config.num_virtual_tokens
        virtual_tokens.check_room(model, tokens)
        virtual_tokens.attentions(model)
        words = (
            tokenizer(virtual_tokens.WORDS, add_special_tokens=False)["input_ids"]
            if tokenizer is not None
            else []
        )
        start = None
        if model.device.type != "meta":
            start = virtual_tokens.words_as_prefix(
                model, [words[place % len(words)] if words else place for place in range(tokens)]
            )
        config = PrefixTuningConfig(
            task_type=head_types.TASK[head],
            modules_to_save=head_types.new_parts(model, head) or None,
            num_virtual_tokens=tokens,
            prefix_projection=self.config.prefix_projection,
            encoder_hidden_size=self.config.encoder_hidden_size,
        )
        adapted = get_peft_model(model, config)
        if start is not None:
            virtual_tokens.start_from(adapted.prompt_encoder[adapted.active_adapter], start)
        virtual_tokens.install(adapted)
        return adapted

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """A projection's weights learn at a hundredth: they are those of a network, where the rate is meant for free numbers."""
        return {name: PROJECTION_RATIO for name in parameters if ".transform." in name}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors: the keys and values, nothing of the base or of a projection."""
        model.save_pretrained(folder, save_embedding_layers=False)
