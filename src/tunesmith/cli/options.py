"""Arguments and options that several verbs share: ``options.Model``, ``options.Json``, ..."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.metrics import tasks
from tunesmith.report import language

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[str, typer.Argument(help="Catalog name, model, adapter or run folder.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]

# training
RecipeFile = Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME of the recipe")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Start again from step 0; move the files of the attempt before to replaced-N/."
    ),
]
DeepSpeed = Annotated[Path | None, typer.Option(help="ds_config.json; ZeRO-2 shards the optimiser.")]


def _set_language(chosen: str | None) -> str | None:
    """Let every page of this program, and of the processes that it starts, have the language."""
    if chosen is not None:
        os.environ[language.VARIABLE] = chosen
    return chosen


Language = Annotated[
    Literal["en", "ko"] | None,
    typer.Option(
        callback=_set_language,
        help="Language of the report: English or Korean.",
        show_default="that of the locale",
    ),
]

# rows
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="FIELD=COLUMN, such as prompt=question; may be repeated, labels= too, for columns of 0 and 1.",
    ),
]
Predictions = Annotated[
    Path | None,
    typer.Option(help="New jsonl file: one object for each row, in order.", show_default="stdout"),
]
Format = Annotated[str | None, typer.Option(help="Format of the rows.", show_default="detected")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N rows only.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of a row.", show_default="the window")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Number format that the model computes in; auto = the fastest of this machine."),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="vllm|ADDRESS", help="Let vLLM answer: in this process, or at the address of its server.",
        show_default="tunesmith's own",
    ),
]  # fmt: skip
DecodeWeights = Annotated[
    Literal["stored", "int8"],
    typer.Option(help="Weights that decoding reads; int8 rounds them: faster, less exact answers."),
]
ServedModel = Annotated[
    str | None, typer.Option(help="Name of the model at --engine ADDRESS.", show_default="the only one")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; never changes the result.")]
Split = Annotated[str, typer.Option(help="Split of a data set on the Hub.")]
Name = Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")]
Streaming = Annotated[bool, typer.Option(help="Stream a data set from the Hub; download nothing.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="alpaca, chatml, roles, korean, a .jinja file or a Jinja string.", show_default="the model's own"
    ),
]
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-kwarg",
        help="NAME=VALUE for the chat template, such as enable_thinking=false; may be repeated.",
    ),
]

System = Annotated[str | None, typer.Option(help="System message.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Task = Annotated[
    tasks.Task | None,
    typer.Option(help="What the answers are: chooses their figures.", show_default="that of training"),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="Figure of the answers, or MODULE:FUNCTION of yours; may be repeated.",
        show_default="those of the task, or all",
    ),
]


def parse_template_kwargs(given: list[str] | None) -> JsonObject:
    """Parse ``["enable_thinking=false"]`` to ``{"enable_thinking": False}``. Other values than JSON are text.

    Raises UserError for an option that is not NAME=VALUE.
    """
    kwargs: JsonObject = {}
    for option in given or ():
        name, equals, value = option.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(
                f"--template-kwarg {option}: expected NAME=VALUE, such as --template-kwarg enable_thinking=false"
            )
        try:
            kwargs[name] = json.loads(value)
        except ValueError:
            kwargs[name] = value
    return kwargs


def describe_decode_weights(weights: str) -> list[str]:
    """Return the line about the weights that decoding reads; none for those that are stored."""
    return (
        []
        if weights == "stored"
        else [f"decoding with {weights} weights; prompts with the weights as stored"]
    )


def label(path: str) -> str:
    """Return the name of a file or folder that is on this machine, and any other name as it is."""
    return Path(path).name if Path(path).exists() else path


def parse_columns(given: list[str] | None) -> dict[str, str | list[str]]:
    """``["text=review", "labels=a", "labels=b"]`` -> ``{"text": "review", "labels": ["a", "b"]}``.

    Raises UserError for an option that is not FIELD=COLUMN.
    """
    columns: dict[str, list[str]] = {}
    for option in given or ():
        field, equals, column = option.partition("=")
        if not (field and equals and column):
            raise UserError(f"--column {option}: expected FIELD=COLUMN, such as --column prompt=question")
        columns.setdefault(field, []).append(column)
    return {field: names[0] if len(names) == 1 else names for field, names in columns.items()}
