"""Prompt tuning: trained embeddings in front of every row, the network frozen (Lester et al. 2021). Files are peft's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models import network
from tunesmith.models.heads import head_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VIRTUAL_TOKENS = 20


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_virtual_tokens: int | None = Field(
        None,
        gt=0,
        description=f"trained embeddings in front of each row (default: those of the text, else {VIRTUAL_TOKENS})",
    )
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = Field(
        "TEXT",
        description="first values: of the text's tokens, of tokens drawn from the vocabulary, or random numbers",
    )
    prompt_tuning_init_text: str | None = Field(
        None, description='such as "Classify the sentiment: "; default: a neutral sentence'
    )

    @model_validator(mode="after")
    def _text_and_kind(self) -> Config:
        if self.prompt_tuning_init != "TEXT" and self.prompt_tuning_init_text is not None:
            raise ValueError(
                f"prompt_tuning_init_text does nothing with prompt_tuning_init: {self.prompt_tuning_init}; use TEXT"
            )
        if self.prompt_tuning_init_text == "":
            raise ValueError(
                "prompt_tuning_init_text is empty: leave it out, or write the words to start from"
            )
        return self


class Adaptation:
    traits = Traits("PROMPT_TUNING")
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
        """A peft model with only the virtual embeddings trainable. Raises RecipeError before the model is touched."""
        import torch
        from peft import PromptTuningConfig, get_peft_model

        from tunesmith.models.adapters import virtual_tokens
        from tunesmith.models.load import vocabulary

        if new_rows:
            raise vocabulary.no_room("prompt")
        if head == "score" and not network.is_causal(model.config) and network.pooling(model.config) is None:
            raise RecipeError(
                f"adaptation: prompt: {type(model).__name__} reads the first token of a row, and with virtual tokens in front "
                "that would be one of them.\n  Set objective.pooling=mean, or use adaptation=lora."
            )
        ids = self._text_ids(tokenizer)
        text = self.config.prompt_tuning_init_text
        tokens = self.config.num_virtual_tokens or (len(ids) if text else VIRTUAL_TOKENS)
        virtual_tokens.check_room(model, tokens)
        # the text's embeddings are written here: peft would load a tokenizer by a path of its own, again at every load
        kind = "SAMPLE_VOCAB" if self.config.prompt_tuning_init == "SAMPLE_VOCAB" else "RANDOM"
        config = PromptTuningConfig(
            task_type=head_types.TASK[head],
            modules_to_save=head_types.new_parts(model, head) or None,
            num_virtual_tokens=tokens,
            token_dim=model.get_input_embeddings().weight.shape[
                1
            ],  # albert's words are narrower than its layers
            prompt_tuning_init=kind,
            prompt_tuning_init_text=text,
        )
        adapted = get_peft_model(model, config)
        weight = adapted.prompt_encoder[adapted.active_adapter].embedding.weight
        if ids:
            with torch.no_grad():
                chosen = torch.tensor(
                    [ids[place % len(ids)] for place in range(tokens)], device=weight.device
                )
                weight.copy_(model.get_input_embeddings()(chosen))
        virtual_tokens.install(adapted)
        return adapted

    def _text_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        from tunesmith.models.adapters import virtual_tokens

        if self.config.prompt_tuning_init != "TEXT":
            return []
        if tokenizer is None:
            raise RecipeError(
                "prompt_tuning_init: TEXT needs the tokenizer of the run. Use SAMPLE_VOCAB or RANDOM."
            )
        ids: list[int] = tokenizer(
            self.config.prompt_tuning_init_text or virtual_tokens.WORDS, add_special_tokens=False
        )["input_ids"]
        return ids

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors: the embeddings, nothing of the base."""
        model.save_pretrained(folder, save_embedding_layers=False)
