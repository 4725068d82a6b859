"""The ``data:`` keys of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tunesmith.data.formats.columns import FORMATS, PLACEHOLDER


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


HUB = "hub:"
HUB_NAME = re.compile(rf"{HUB}(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")
"""``hub:OWNER/NAME``, or ``hub:OWNER/NAME@REVISION`` (a commit, tag or branch)."""

HUB_KEYS = ("split", "name", "streaming")
"""Keys of a source that apply to Hub data sets only."""


KEEP_IF = "keep_if"
"""Key of ``columns`` that is no field of a format: the column that is true in the rows to keep."""


READING_KEYS = ("format", "columns", "separator", "prompt_template", "numbers_as_text")
"""Keys of a source that say how its columns become rows."""


class Source(Strict):
    """One source of rows: a file, a folder of classes, a built-in set, or a split of a Hub data set."""

    path: str = Field(
        description="json, jsonl, csv, tsv, txt, conll or parquet file, folder of .txt files by class, builtin:NAME, "
        "or hub:OWNER/NAME[]"
    )
    split: str = Field("train", description="split of a Hub data set")
    name: str | None = Field(None, description="configuration of a Hub data set that has several")
    streaming: bool = Field(False, description="stream a Hub data set, without storing its files")
    format: str | None = Field(None, description=f"one of {', '.join(FORMATS)}; detected when absent")
    columns: dict[str, str | Annotated[list[str], Field(min_length=1)]] | None = Field(
        None,
        description="field of the format -> column of the file, e.g. {prompt: question}; "
        "labels may also be several columns of 0 and 1, e.g. {labels: [toxic, insult]}; "
        "{keep_if: COLUMN} keeps the rows in which that column is true",
    )
    separator: str | None = Field(None, min_length=1, description="separator of labels in a cell, e.g. '|'")
    prompt_template: str | None = Field(None, description="prompt from columns, e.g. 'Summarise: {text}'")
    numbers_as_text: bool = Field(False, description="read numbers in columns of text as text: 42 as '42'")
    weight: float = Field(1.0, gt=0, description="passes per epoch: 2 = twice, 0.5 = a random half")
    limit: int | None = Field(None, gt=0, description="use the first N rows only")

    @field_validator("columns", mode="before")
    @classmethod
    def _column_numbers_as_text(cls, columns: object) -> object:
        """Files without column names number their columns, and YAML reads a number as an int."""

        def as_text(column: object) -> object:
            return str(column) if type(column) is int else column

        if not isinstance(columns, dict):
            return columns
        return {
            field: list(map(as_text, column)) if isinstance(column, list | tuple) else as_text(column)
            for field, column in columns.items()
        }

    @field_validator("columns")
    @classmethod
    def _check_keep_if(cls, columns: Mapping[str, object] | None) -> Mapping[str, object] | None:
        if columns and not isinstance(columns.get(KEEP_IF, ""), str):
            raise ValueError(f"{KEEP_IF} takes one column, got a list ({columns[KEEP_IF]})")
        return columns

    @property
    def keep_if(self) -> str | None:
        """The column that is true in the rows to keep; None keeps all rows."""
        return str(self.columns[KEEP_IF]) if self.columns and KEEP_IF in self.columns else None

    def nested_columns(self) -> list[str]:
        """Columns of the form ``a.b`` that the recipe names: field b of the objects in column a."""
        mapped = [[to] if isinstance(to, str) else to for to in (self.columns or {}).values()]
        used = [
            *(name for names in mapped for name in names),
            *PLACEHOLDER.findall(self.prompt_template or ""),
        ]
        return [name for name in used if "." in name]

    @property
    def mapping(self) -> dict[str, str | list[str]]:
        """Field of the format -> column of the file."""
        return {field: column for field, column in (self.columns or {}).items() if field != KEEP_IF}

    @field_validator("path")
    @classmethod
    def _check_hub_name(cls, path: str) -> str:
        if path.startswith(HUB) and not HUB_NAME.fullmatch(path):
            raise ValueError(
                f"expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION, got {path!r} (for a file of that name write ./{path})"
            )
        return path

    @property
    def hub(self) -> bool:
        """True for a Hub data set."""
        return self.path.startswith(HUB)

    @property
    def label(self) -> str:
        """Name in messages and reports: the path; of a Hub data set also configuration and split."""
        return "/".join([self.path, *filter(None, [self.name]), self.split]) if self.hub else self.path

    def unused_keys(self) -> list[str]:
        """Keys of a Hub data set that are set although this source is none."""
        return [] if self.hub else [key for key in HUB_KEYS if key in self.model_dump(exclude_defaults=True)]


class GenerateConfig(Strict):
    """Answers to held-out prompts at every evaluation; their figures are called eval_answer_NAME."""

    rows: int = Field(50, gt=0, description="held-out prompts that the model answers at every evaluation")
    max_new_tokens: int = Field(128, gt=0, description="longest answer, in tokens")
    metrics: list[str] = Field(
        default_factory=list,
        description="figures such as rougeL, or MODULE:FUNCTION of yours; default: those of the task, or all",
    )
    folder: str | None = Field(None, description="folder of the functions; default: that of the recipe")

    @model_validator(mode="before")
    @classmethod
    def _fill_folder(cls, keys: object, info: ValidationInfo) -> object:
        """A recipe is read from a file in a folder, which the run's copy of the recipe must remember."""
        folder = (info.context or {}).get("folder")
        functions = isinstance(keys, dict) and any(":" in str(name) for name in keys.get("metrics") or ())
        return {"folder": folder, **keys} if isinstance(keys, dict) and functions and folder else keys


class EvalConfig(Strict):
    """The evaluation set: a share of the training rows, a separate file, or several named files."""

    fraction: float = Field(0.05, ge=0, lt=1, description="share of training rows held out; 0 = none")
    limit: int | None = Field(None, gt=0, description="maximum number of evaluation rows")
    path: str | None = Field(None, description="separate file, read like the first training source")
    sets: dict[str, Source] | None = Field(
        None,
        description="several files, each with separate metrics: {korean: {path: ko.csv}, code: {path: code.jsonl, limit: 200}}",
    )

    generate: GenerateConfig | None = Field(
        None, description="let a language model answer held-out prompts at every evaluation, as {rows: 50}"
    )

    @field_validator("path")
    @classmethod
    def _refuse_hub(cls, path: str | None) -> str | None:
        if path is not None and path.startswith(HUB):
            raise ValueError(
                f"a Hub data set needs a split: data.eval.sets: {{test: {{path: {path}, split: test}}}}"
            )
        return path

    @field_validator("sets")
    @classmethod
    def _check_names(cls, sets: dict[str, Source] | None) -> dict[str, Source] | None:
        if sets is not None and not sets:
            raise ValueError(
                "expected at least one set, as {korean: {path: ko.csv}}; leave the key out for none"
            )
        for name in sets or ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"the name {name!r} must be made of letters, digits, - and _, because metrics are called eval_NAME_loss"
                )
        return sets


class DataConfig(Strict):
    train: list[Source] = Field(min_length=1)
    eval: EvalConfig = EvalConfig()
    template: str | None = Field(
        None,
        description="alpaca, chatml, roles, korean, a .jinja file, or a Jinja string; default: the model's own",
    )
    template_kwargs: dict[str, object] = Field(
        {}, description="variables of the chat template, e.g. {enable_thinking: false}; saved with the model"
    )
    special_tokens: Literal["text", "allow", "error"] = Field(
        "text",
        description="tokens that open or close a turn, typed in a message: text = plain text, allow = the tokens",
    )
    bad_rows: Literal["error", "skip"] = Field("error", description="skip = count, list and drop them")
    max_unlearnable: float = Field(
        0.2, ge=0, le=1, description="maximum share of rows without supervised tokens"
    )
    cache: bool = Field(True, description="keep processed rows on disk, keyed by content")

    @field_validator("template_kwargs")
    @classmethod
    def _check_variables(cls, kwargs: dict[str, object]) -> dict[str, object]:
        for name in kwargs:
            if not name.isidentifier():
                raise ValueError(f"expected names of variables, as {{enable_thinking: false}}, got {name!r}")
        return kwargs
