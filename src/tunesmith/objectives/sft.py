"""Supervised fine-tuning: learn to answer as the data answers (Ouyang et al. 2022, step 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.encode import conversations
from tunesmith.data.rows import Chat, PromptCompletion, Text, Written
from tunesmith.objectives import Example, Overlong, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Config(objectives.Config):
    train_on: Literal["completion", "assistant", "all"] = Field(
        "completion", description="completion = the last answer; assistant = every answer; all = every token"
    )
    expand_turns: bool = Field(
        False, description="one example per assistant turn, so that training sees what generation sees"
    )
    overlong: Overlong = Field("error", description="what happens to a row above max_length")

    @model_validator(mode="after")
    def _check_expanded_turns(self) -> Config:
        if self.expand_turns and self.train_on != "completion":
            raise ValueError(
                f"expand_turns makes one example of each answer, so train_on: {self.train_on} would train on the earlier "
                "answers again in every later example. Leave out one of the two"
            )
        return self


class Objective(objectives.LanguageModel):
    config: Config
    traits = Traits(
        rows=(Chat, PromptCompletion, Text), shares_beginnings=True, starter={"path": "builtin:docstrings"}, assumed=True
    )  # fmt: skip

    def encode(self, rows: Sequence[Written], tokenizer: Tokenizer) -> list[list[Example]]:
        train_on, expand_turns = self.config.train_on, self.config.expand_turns
        return conversations.encode(rows, tokenizer, train_on=train_on, expand_turns=expand_turns)
