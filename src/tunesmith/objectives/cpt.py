"""Continued pre-training: learn documents whole, each closed by the end token (Gururangan et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.data.batch import pack
from tunesmith.data.encode import chat
from tunesmith.data.rows import Text, Written
from tunesmith.objectives import Batch, Example


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    overlong: Literal["split", "error", "drop", "truncate"] = Field(
        "split", description="split = a long document becomes blocks of max_length, none of its tokens lost"
    )


class Objective:
    head = "lm"
    rows: tuple[type, ...] = (Text,)
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

    def adopt(self, config: Any, tokenizer: Any, max_length: int | None) -> None:
        """Nothing of it depends on the network."""

    def survey(self, rows: Iterable[Any]) -> None:
        """No row needs to be looked at."""

    def head_config(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[Written], tokenizer: Any) -> list[list[Example]]:
        return chat.encode(rows, tokenizer, train_on="all")

    def collate(self, examples: Sequence[Example], packed: bool) -> Batch:
        return pack.pack(examples) if packed else pack.pad(examples)

    def count(self, batch: Batch) -> Any:
        """Tokens that have one before them in their block."""
        return batch["labels"].new_tensor(batch["labels"].numel())

    def loss(self, model: Any, batch: Batch) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        """sum over tokens of -log p(token | its block so far)."""
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
        from tunesmith.metrics.token_mean import token_mean

        return token_mean(records)
