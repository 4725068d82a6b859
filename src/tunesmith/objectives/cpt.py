"""Continued pre-training: learn documents whole, each closed by the end token (Gururangan et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import conversations
from tunesmith.data.rows import Text, Written
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    overlong: Literal["split", "error", "drop", "truncate"] = Field(
        "split", description="split = a long document becomes blocks of max_length, none of its tokens lost"
    )


class Objective(objectives.Objective):
    traits = Traits(
        rows=(Text,),
        overlong="split",
        starter={"path": "builtin:docstrings", "format": "text", "columns": {"text": "response"}},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, overlong=config.overlong)

    def encode(self, rows: Sequence[Written], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return conversations.encode(rows, tokenizer, train_on="all")

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return pack.with_targets(examples, layout)

    def count(self, batch: Batch) -> int:
        """Tokens that have one before them in their block."""
        return int(batch["labels"].numel())

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """sum over tokens of -log p(token | its block so far)."""
        from tunesmith.models.heads.lm_head import lm_loss

        return lm_loss(model, batch), {}

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        from tunesmith.models.heads.lm_head import row_losses

        return {"rows": row_losses(model, batch)}

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        from tunesmith.metrics.token_mean import token_mean

        return token_mean(records)
