"""``tunesmith score MODEL --data FILE [--out FILE]``: what a reward model gives every answer, and the order of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.cli.predict import predict_into


def score(
    model: Annotated[str, typer.Argument(help="A reward model: catalog name, model, adapter or run folder.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(help="Prompts with one answer, or with several (chosen and rejected, or a list).", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option(help="New jsonl file: one object for each row, in order.", show_default="stdout")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of the rows.", show_default="detected")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, such as chosen=good; may be repeated.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N rows only.", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row.", show_default="the model's window")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; never changes the result.")] = 2048,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "train",
    name: Annotated[
        str | None, typer.Option(help="Of a data set of the Hub with several configurations: which.", show_default=False)
    ] = None,
    streaming: Annotated[bool, typer.Option(help="Of a data set of the Hub: rows over the network, no file of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """The reward of every answer; where a row has several, their order, best first. Judgements in the file are not looked at."""
    predict_into(
        model, data, out, "scoring", as_json, column, format=format, limit=limit, max_length=max_length, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming,
    )  # fmt: skip
