"""Supervised fine-tuning: learn to answer as the data answers (Ouyang et al. 2022, step 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import conversations
from tunesmith.data.rows import Chat, PromptCompletion, Text, Written
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    train_on: Literal["completion", "assistant", "all"] = Field(
        "completion", description="completion = the last answer; assistant = every answer; all = every token"
    )
    expand_turns: bool = Field(
        False, description="one example per assistant turn, so that training sees what generation sees"
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what happens to a row above max_length"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.expand_turns and self.train_on != "completion":
            raise ValueError(
                f"expand_turns makes an example of each answer, so train_on: {self.train_on} would teach the earlier turns again "
                "in every later one. Leave out one of the two"
            )
        return self


class Objective(objectives.Objective):
    traits = Traits(rows=(Chat, PromptCompletion, Text), starter={"path": "builtin:docstrings"}, assumed=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, overlong=config.overlong)

    def encode(self, rows: Sequence[Written], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return conversations.encode(
            rows, tokenizer, train_on=self.config.train_on, expand_turns=self.config.expand_turns
        )

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return pack.with_targets(examples, layout)

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        return int(batch["labels"].numel())

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """sum over supervised tokens of -log p(token | everything before it in its row)."""
        from tunesmith.models.heads.lm_head import lm_loss

        return lm_loss(model, batch), {}

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        from tunesmith.models.heads.lm_head import row_losses

        return {"rows": row_losses(model, batch)}

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Mean over all supervised tokens with its standard error, whatever the batches were; perplexity is its exponential."""
        from tunesmith.metrics.token_mean import token_mean

        return token_mean(records)
