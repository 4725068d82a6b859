"""Continued pre-training: whole documents, each closed by the end-of-text token (Gururangan et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith import objectives
from tunesmith.data.encode import conversations
from tunesmith.data.rows import Text, Written
from tunesmith.objectives import Example, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Config(objectives.Config):
    overlong: Literal["split", "error", "drop", "truncate"] = Field(
        "split", description="split = a long document becomes blocks of max_length, none of its tokens lost"
    )


class Objective(objectives.LanguageModel):
    config: Config
    traits = Traits(
        rows=(Text,),
        overlong="split",
        starter={"path": "builtin:docstrings", "format": "text", "columns": {"text": "response"}},
    )

    def encode(self, rows: Sequence[Written], tokenizer: Tokenizer) -> list[list[Example]]:
        return conversations.encode(rows, tokenizer, train_on="all")
