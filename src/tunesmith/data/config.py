"""The recipe's ``data:`` keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FORMATS = ("alpaca", "input_output", "summary", "question_answer", "sharegpt", "messages", "prompt_completion", "text")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """One file of rows."""

    path: str = Field(description="json, jsonl, csv, tsv, txt or parquet file, or builtin:docstrings")
    format: str | None = Field(None, description=f"one of {', '.join(FORMATS)}; detected when absent")
    columns: dict[str, str] | None = Field(None, description="field of the format -> column of the file, e.g. {prompt: question}")
    prompt_template: str | None = Field(None, description="prompt made from columns, e.g. 'Summarise: {text}'")
    weight: float = Field(1.0, gt=0, description="how often the source is seen per epoch: 2 = twice, 0.5 = a random half")
    limit: int | None = Field(None, gt=0, description="use the first N rows only")


class EvalConfig(Strict):
    """Held-out rows: a share of the training rows, or files of their own."""

    fraction: float = Field(0.05, ge=0, lt=1, description="share of the training rows held out; 0 = no evaluation")
    limit: int | None = Field(None, gt=0, description="at most so many rows")
    path: str | None = Field(None, description="a file of its own, instead of a fraction")
    format: str | None = None
    columns: dict[str, str] | None = None
    prompt_template: str | None = None


class DataConfig(Strict):
    train: list[Source] = Field(min_length=1)
    eval: EvalConfig = EvalConfig()
    template: str | None = Field(None, description="alpaca, chatml, roles, korean, or a Jinja string; default: the model's own")
    bad_rows: Literal["error", "skip"] = Field("error", description="skip = leave bad rows out, count and list them")
    max_unlearnable: float = Field(0.2, ge=0, le=1, description="stop when a larger share of rows has nothing to learn")
    cache: bool = Field(True, description="keep processed rows on disk, keyed by content")
