"""The recipe's ``data:`` keys."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

FORMATS = (
    "alpaca", "input_output", "summary", "question_answer", "sharegpt", "messages", "prompt_completion", "text",
    "labelled", "multilabel", "tokens", "conll", "words", "squad",
    "preference", "preference_turns", "preference_alpaca", "preference_dialogues", "ranking", "ranking_alpaca",
    "judged", "judged_turns", "judged_alpaca", "unpaired", "unpaired_turns", "unpaired_alpaca", "unpaired_dialogues",
)  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


HUB = "hub:"
HUB_NAME = re.compile(rf"{HUB}(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")
"""``hub:OWNER/NAME``, or ``hub:OWNER/NAME@REVISION`` (a commit, a tag or a branch)."""


class Source(Strict):
    """One file of rows, a built-in set, or a split of a data set of the Hub."""

    path: str = Field(
        description="json, jsonl, csv, tsv, txt, conll or parquet file, a folder with one of .txt files for each class, "
        "builtin:NAME, or hub:OWNER/NAME[@REVISION] of the Hub"
    )
    split: str = Field("train", description="of a data set of the Hub: which of its splits")
    name: str | None = Field(
        None, description="of a data set of the Hub that has several configurations: which"
    )
    streaming: bool = Field(
        False, description="of a data set of the Hub: read its rows over the network, keep no file of it"
    )
    format: str | None = Field(None, description=f"one of {', '.join(FORMATS)}; detected when absent")
    columns: dict[str, str | Annotated[list[str], Field(min_length=1)]] | None = Field(
        None,
        description="field of the format -> column of the file, e.g. {prompt: question}; "
        "of labels also several columns of 0 and 1, e.g. {labels: [toxic, insult]}",
    )
    separator: str | None = Field(
        None, min_length=1, description="what stands between the labels of a cell, e.g. '|'"
    )
    prompt_template: str | None = Field(
        None, description="prompt made from columns, e.g. 'Summarise: {text}'"
    )
    weight: float = Field(
        1.0, gt=0, description="how often the source is seen per epoch: 2 = twice, 0.5 = a random half"
    )
    limit: int | None = Field(None, gt=0, description="use the first N rows only")

    @field_validator("columns", mode="before")
    @classmethod
    def _numbered(cls, columns: Any) -> Any:
        """Columns without names go by their number, which YAML reads as one."""

        def name(column: Any) -> Any:
            return str(column) if type(column) is int else column

        if not isinstance(columns, dict):
            return columns
        return {
            field: list(map(name, to)) if isinstance(to, list | tuple) else name(to)
            for field, to in columns.items()
        }

    @field_validator("path")
    @classmethod
    def _named(cls, path: str) -> str:
        if path.startswith(HUB) and not HUB_NAME.fullmatch(path):
            raise ValueError(
                f"expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION, got {path!r} (a file of that name: ./{path})"
            )
        return path

    @property
    def hub(self) -> bool:
        """Whether the rows are those of a data set of the Hub."""
        return self.path.startswith(HUB)

    @property
    def label(self) -> str:
        """What the source is called in messages and reports: its path; of the Hub with configuration and split."""
        return "/".join([self.path, *filter(None, [self.name]), self.split]) if self.hub else self.path


class EvalConfig(Strict):
    """Held-out rows: a share of the training rows, a file of their own, or several named files."""

    fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the training rows held out; 0 = no evaluation"
    )
    limit: int | None = Field(None, gt=0, description="at most so many rows")
    path: str | None = Field(
        None, description="a file of its own, read the way the first training source is read"
    )
    sets: dict[str, Source] | None = Field(
        None,
        description="several files, each with figures of its own: {korean: {path: ko.csv}, code: {path: code.jsonl, limit: 200}}",
    )

    @field_validator("path")
    @classmethod
    def _a_file(cls, path: str | None) -> str | None:
        if path is not None and path.startswith(HUB):
            raise ValueError(
                f"a data set of the Hub needs a split: data.eval.sets: {{test: {{path: {path}, split: test}}}}"
            )
        return path

    @field_validator("sets")
    @classmethod
    def _named(cls, sets: dict[str, Source] | None) -> dict[str, Source] | None:
        if sets is not None and not sets:
            raise ValueError(
                "expected at least one set, such as {korean: {path: ko.csv}}; leave the key out for none"
            )
        for name in sets or ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"the name {name!r} must be made of letters, digits, - and _: figures are called eval_NAME_loss"
                )
        return sets


class DataConfig(Strict):
    train: list[Source] = Field(min_length=1)
    eval: EvalConfig = EvalConfig()
    template: str | None = Field(
        None, description="alpaca, chatml, roles, korean, or a Jinja string; default: the model's own"
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="skip = leave bad rows out, count and list them"
    )
    max_unlearnable: float = Field(
        0.2, ge=0, le=1, description="stop when a larger share of rows has nothing to learn"
    )
    cache: bool = Field(True, description="keep processed rows on disk, keyed by content")


def idle(source: Source) -> list[str]:
    """The keys of a source that would do nothing: those of a data set of the Hub, where the rows come from elsewhere."""
    if source.hub:
        return []
    defaults = Source(path=source.path)
    return [key for key in ("split", "name", "streaming") if getattr(source, key) != getattr(defaults, key)]
