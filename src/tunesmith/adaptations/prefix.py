"""Prefix tuning: trained keys and values before every row, in every layer (Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.models.heads import head_types
from tunesmith.models.load import vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

PROJECTION_RATIO = 0.01
"""Factor on the learning rate for the projection: weights of a network need smaller steps than a prefix."""


class Config(adaptations.Config):
    num_virtual_tokens: int = Field(
        20, gt=0, description="trained keys and values before each row, in each layer"
    )
    prefix_projection: bool = Field(
        False, description="compute them with a small network while training (section 4.3 of the paper)"
    )
    encoder_hidden_size: int | None = Field(
        None, gt=0, description="width of that network; default: the width of all key heads together"
    )

    @model_validator(mode="after")
    def _check_projection(self) -> Config:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                "encoder_hidden_size is the width of the network that prefix_projection: true adds: set both"
            )
        return self


class Adaptation(adaptations.Adaptation):
    config: Config
    traits = Traits("PREFIX_TUNING")
    learning_rate = 1e-2

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return a peft model with only the prefix trainable. Raises RecipeError or ModelError."""
        from peft import PrefixTuningConfig, get_peft_model

        from tunesmith.models.adapters import virtual_tokens

        if new_rows:
            raise vocabulary.no_room("prefix")
        count = self.config.num_virtual_tokens
        virtual_tokens.check_room(model, count)
        virtual_tokens.attentions(model)
        config = PrefixTuningConfig(
            task_type=head_types.TASK[head],
            modules_to_save=head_types.new_parts(model, head) or None,
            **self.config.model_dump(),
        )
        initial = None
        if model.device.type != "meta":
            ids = list(range(count))
            if tokenizer is not None:
                words = tokenizer(virtual_tokens.WORDS, add_special_tokens=False)["input_ids"]
                ids = [words[index % len(words)] for index in ids] if words else ids
            initial = virtual_tokens.words_as_prefix(model, ids)
        adapted = get_peft_model(model, config)
        if initial is not None:
            virtual_tokens.start_from(adapted.prompt_encoder[adapted.active_adapter], initial)
        virtual_tokens.install(adapted)
        return adapted

    def learning_rates(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {name: PROJECTION_RATIO for name in parameters if ".transform." in name}
