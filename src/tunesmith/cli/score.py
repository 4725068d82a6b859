"""``tunesmith score MODEL --data FILE [--out FILE]``: what a reward model gives every answer, and the order of several."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.options import (
    BatchTokens,
    Format,
    Json,
    Limit,
    MaxLength,
    Name,
    Precision,
    Predictions,
    Split,
    Streaming,
)
from tunesmith.cli.predict import predict_into


def score(
    model: Annotated[
        str,
        typer.Argument(
            help="A reward model: catalog name, model, adapter or run folder.", show_default=False
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Prompts with one answer, or with several (chosen and rejected, or a list).",
            show_default=False,
        ),
    ],
    out: Predictions = None,
    format: Format = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=COLUMN, such as chosen=good; may be repeated.", show_default=False),
    ] = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    precision: Precision = "auto",
    batch_tokens: BatchTokens = 2048,
    split: Split = "train",
    name: Name = None,
    streaming: Streaming = False,
    as_json: Json = False,
) -> None:
    """The reward of every answer; where a row has several, their order, best first. Judgements in the file are not looked at."""
    predict_into(
        model, data, out, "scoring", as_json, column, format=format, limit=limit, max_length=max_length, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming,
    )  # fmt: skip
