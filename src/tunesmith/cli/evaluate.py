"""``tunesmith evaluate MODEL --data FILE``: loss and perplexity on rows the model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from tunesmith.cli.output import result
from tunesmith.errors import UserError


def evaluate(
    model: Annotated[str, typer.Argument(help="Catalog name, model, adapter or run folder.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="json, jsonl, csv, tsv, txt or parquet file, builtin:docstrings, or hub:OWNER/NAME.", show_default=False
        ),
    ],
    objective: Annotated[str, typer.Option(help="What is learnt of a row: sft = the last answer, cpt = every token.")] = "sft",
    format: Annotated[str | None, typer.Option(help="Format of the rows.", show_default="detected")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, such as prompt=question; may be repeated.", show_default=False)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="alpaca, chatml, roles, korean or Jinja.", show_default="the model's own")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row.", show_default="the model's window")] = None,
    overlong: Annotated[
        str | None, typer.Option(help="Rows above it: error, drop, truncate or split.", show_default="the objective's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N rows only.", show_default=False)] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; never changes the result.")] = 2048,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "train",
    name: Annotated[
        str | None, typer.Option(help="Of a data set of the Hub with several configurations: which.", show_default=False)
    ] = None,
    streaming: Annotated[bool, typer.Option(help="Of a data set of the Hub: rows over the network, no file of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Loss and perplexity of a model on a data file, and how fast it reads."""
    columns = columns_of(column or [])

    from tunesmith.evaluate import run

    figures = run.evaluate(
        model,
        data,
        objective=objective,
        format=format,
        columns=columns,
        template=template,
        max_length=max_length,
        overlong=overlong,
        limit=limit,
        precision=precision,
        batch_tokens=batch_tokens,
        split=split,
        name=name,
        streaming=streaming,
    )
    result(
        figures,
        as_json,
        lambda found: (
            f"eval loss   {found['eval_loss']:.4f}{_error(found)} per supervised token\n"
            f"perplexity  {found['perplexity']:.3f}\n"
            f"read        {found['rows']:,} rows, {found['tokens']:,} tokens, {found['supervised_tokens']:,} of them supervised\n"
            f"speed       {found['tokens_per_second']:.0f} tokens/s, {found['seconds']:.1f} s"
        ),
    )


def _error(found: Mapping[str, Any]) -> str:
    return f" ± {found['eval_loss_stderr']:.4f}" if "eval_loss_stderr" in found else ""


def columns_of(pairs: list[str]) -> dict[str, str] | None:
    """``["prompt=question"]`` -> {"prompt": "question"}; None when empty."""
    columns = {}
    for pair in pairs:
        field, equals, name = pair.partition("=")
        if not (field and equals and name):
            raise UserError(f"--column {pair!r}: expected FIELD=COLUMN, for example --column prompt=question")
        columns[field] = name
    return columns or None
