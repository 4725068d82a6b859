"""Prompt tuning: trained embeddings before every row, the network frozen (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.models.load import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

VIRTUAL_TOKENS = 20


class Config(adaptations.Config):
    num_virtual_tokens: int | None = Field(
        None,
        gt=0,
        description=f"trained embeddings before each row (default: one for each token of the text, else {VIRTUAL_TOKENS})",
    )
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = Field(
        "TEXT",
        description="initial values: the text's token embeddings, those of random tokens, or random numbers",
    )
    prompt_tuning_init_text: str | None = Field(
        None, description='such as "Classify the sentiment: "; default: a neutral sentence'
    )

    @model_validator(mode="after")
    def _check_text(self) -> Config:
        if self.prompt_tuning_init != "TEXT" and self.prompt_tuning_init_text is not None:
            raise ValueError(
                f"prompt_tuning_init_text does nothing with prompt_tuning_init: {self.prompt_tuning_init}; use TEXT"
            )
        if self.prompt_tuning_init_text == "":
            raise ValueError("prompt_tuning_init_text is empty: leave it out, or write the initial words")
        return self


class Adaptation(adaptations.Adaptation):
    config: Config
    traits = Traits("PROMPT_TUNING")
    learning_rate = 1e-2

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return a peft model with only the virtual embeddings trainable. Raises RecipeError."""
        import torch
        from peft import PromptTuningConfig, get_peft_model

        from tunesmith.models.adapters import virtual_tokens

        if new_rows:
            raise vocabulary.no_room("prompt")
        if head == "score" and not network.is_causal(model.config) and network.pooling(model.config) is None:
            raise RecipeError(
                f"adaptation: prompt: {type(model).__name__} reads the first token of a row, which would be a virtual token.\n"
                "  Set objective.pooling=mean, or use adaptation=lora."
            )
        ids = self._text_ids(tokenizer)
        text = self.config.prompt_tuning_init_text
        count = self.config.num_virtual_tokens or (len(ids) if text else VIRTUAL_TOKENS)
        virtual_tokens.check_room(model, count)
        embedding = model.get_input_embeddings()
        config = PromptTuningConfig(
            task_type=head_types.TASK[head],
            modules_to_save=head_types.new_parts(model, head) or None,
            num_virtual_tokens=count,
            token_dim=embedding.weight.shape[1],  # albert's embedding is narrower than its layers
            # with TEXT peft would load a tokenizer at every load; the embeddings are written below instead
            prompt_tuning_init="SAMPLE_VOCAB"
            if self.config.prompt_tuning_init == "SAMPLE_VOCAB"
            else "RANDOM",
            prompt_tuning_init_text=text,
        )
        adapted = get_peft_model(model, config)
        weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
        if ids:
            with torch.no_grad():
                repeated = [ids[index % len(ids)] for index in range(count)]
                weight.copy_(embedding(torch.tensor(repeated, device=weight.device)))
        virtual_tokens.install(adapted)
        return adapted

    def _text_ids(self, tokenizer: Tokenizer) -> list[int]:
        from tunesmith.models.adapters import virtual_tokens

        if self.config.prompt_tuning_init != "TEXT":
            return []
        if tokenizer is None:
            raise RecipeError(
                "prompt_tuning_init: TEXT needs the tokenizer of the run. Use SAMPLE_VOCAB or RANDOM."
            )
        text = self.config.prompt_tuning_init_text or virtual_tokens.WORDS
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
