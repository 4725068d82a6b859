"""Supervised fine-tuning: learn to answer as the data answers (Ouyang et al. 2022, step 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.data.batch import pack
from tunesmith.data.encode import chat
from tunesmith.data.rows import Chat, PromptCompletion, Text, Written
from tunesmith.objectives import Batch, Example


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    train_on: Literal["completion", "assistant", "all"] = Field(
        "completion", description="completion = the last answer; assistant = every answer; all = every token"
    )
    expand_turns: bool = Field(False, description="one example per assistant turn, so that training sees what generation sees")
    overlong: Literal["error", "drop", "truncate"] = Field("error", description="what happens to a row above max_length")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.expand_turns and self.train_on != "completion":
            raise ValueError(
                f"expand_turns makes an example of each answer, so train_on: {self.train_on} would teach the earlier turns again "
                "in every later one. Leave out one of the two"
            )
        return self


class Objective:
    head = "lm"
    rows: tuple[type, ...] = (Chat, PromptCompletion, Text)
    best = ("eval_loss", "min")
    notes: Sequence[str] = ()
    max_length: int | None = None
    deterministic = False
    shared = False
    reference = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.facts: dict[str, Any] = {}
        self.overlong: str = config.overlong
        self.expand_turns = config.expand_turns

    def adopt(self, config: Any, tokenizer: Any, max_length: int | None) -> None:
        """Nothing of it depends on the network."""

    def survey(self, rows: Iterable[Any]) -> None:
        """No row needs to be looked at."""

    def head_config(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[Written], tokenizer: Any) -> list[list[Example]]:
        return chat.encode(rows, tokenizer, train_on=self.config.train_on, expand_turns=self.config.expand_turns)

    def collate(self, examples: Sequence[Example], packed: bool) -> Batch:
        return pack.pack(examples) if packed else pack.pad(examples)

    def count(self, batch: Batch) -> Any:
        """Supervised tokens."""
        return batch["labels"].new_tensor(batch["labels"].numel())

    def loss(self, model: Any, batch: Batch) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        """sum over supervised tokens of -log p(token | everything before it in its row)."""
        from tunesmith.models.heads.lm_head import lm_loss

        return lm_loss(model, batch), {}

    def batches(self, model: Any, loader: Iterable[Any]) -> Iterable[Any]:
        return loader

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Any]:
        from tunesmith.models.heads.lm_head import row_losses

        return {"rows": row_losses(model, batch)}

    def tune(self, records: Sequence[dict[str, Any]]) -> None:
        """There is nothing to choose."""

    def of_model(self) -> None:
        """A language model was told nothing but its words."""

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def present(self, row: Any, answer: dict[str, Any]) -> dict[str, Any]:
        return answer

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return []

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Mean over all supervised tokens with its standard error, whatever the batches were; perplexity is its exponential."""
        from tunesmith.metrics.token_mean import token_mean

        return token_mean(records)
