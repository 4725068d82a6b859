"""``tunesmith evaluate MODEL --data FILE``: loss and figures on rows the model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from tunesmith.cli.options import (
    BatchTokens,
    Format,
    Json,
    Limit,
    MaxLength,
    Name,
    Precision,
    Split,
    Streaming,
)
from tunesmith.cli.output import result
from tunesmith.errors import UserError


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Catalog name, model, adapter or run folder.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="json, jsonl, csv, tsv, txt or parquet file, builtin:NAME, or hub:OWNER/NAME.",
            show_default=False,
        ),
    ],
    objective: Annotated[
        str | None,
        typer.Option(
            help="sft = the last answer, cpt = every token, ...", show_default="what it was trained for"
        ),
    ] = None,
    format: Format = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=COLUMN, such as prompt=question; may be repeated, labels= too, for columns of 0 and 1.",
            show_default=False,
        ),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="What stands between the labels of a cell, such as '|'.", show_default=False),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="alpaca, chatml, roles, korean or Jinja.", show_default="the model's own"),
    ] = None,
    max_length: MaxLength = None,
    overlong: Annotated[
        str | None,
        typer.Option(
            help="Rows above it: error, drop, truncate or split.", show_default="the objective's own"
        ),
    ] = None,
    bad_rows: Annotated[
        Literal["error", "skip"],
        typer.Option(help="Rows that cannot be read: stop, or leave them out and count them."),
    ] = "error",
    limit: Limit = None,
    precision: Precision = "auto",
    batch_tokens: BatchTokens = 2048,
    split: Split = "train",
    name: Name = None,
    streaming: Streaming = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for a report of a model that classifies, tags or answers.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss and figures of a model on a data file, and how fast it reads."""
    columns = columns_of(column or [])

    from tunesmith.evaluate import evaluate_model

    figures = evaluate_model.evaluate(
        model,
        data,
        objective=objective,
        format=format,
        columns=columns,
        separator=separator,
        template=template,
        max_length=max_length,
        overlong=overlong,
        bad_rows=bad_rows,
        limit=limit,
        precision=precision,
        batch_tokens=batch_tokens,
        split=split,
        name=name,
        streaming=streaming,
        out=out,
    )
    result(figures, as_json, _shown)


def _shown(found: Mapping[str, Any]) -> Any:
    """What a person sees: the figures, those of each class or type, and where the report is."""
    bad = f", {found['bad_rows']:,} bad rows left out" if "bad_rows" in found else ""
    read = f"{found['rows']:,} rows, {found['tokens']:,} tokens, {found['supervised_tokens']:,} of them supervised{bad}"
    speed = f"speed       {found['tokens_per_second']:.0f} tokens/s, {found['seconds']:.1f} s"
    if "perplexity" in found:
        return (
            f"eval loss   {found['eval_loss']:.4f}{_error(found)} per supervised token\n"
            f"perplexity  {found['perplexity']:.3f}\n"
            f"read        {read}\n{speed}"
        )
    table = Table(
        "figure",
        "value",
        title=f"{found['objective']}, {found['rows']:,} examples{bad}",
        title_justify="left",
    )
    for name, value in found.items():
        if name.startswith("eval_") and not name.endswith("_stderr"):
            error = _error(found) if name == "eval_loss" else ""
            table.add_row(name.removeprefix("eval_").replace("_", " "), f"{value:.4f}{error}")
    shown: list[Any] = [table]
    details = found.get("details") or {}
    by_name = details.get("per_class") or details.get("by_type") or details.get("by_length") or {}
    if by_name:
        columns = list(dict.fromkeys(key for figures in by_name.values() for key in figures))
        each = Table(
            "", *(column.replace("_", " ") for column in columns), title="each", title_justify="left"
        )
        for name, figures in by_name.items():
            each.add_row(str(name), *(_cell(figures.get(column)) for column in columns))
        shown.append(each)
    return [*shown, "\n".join([speed, *([f"report      {found['report']}"] if "report" in found else [])])]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _error(found: Mapping[str, Any]) -> str:
    return f" ± {found['eval_loss_stderr']:.4f}" if "eval_loss_stderr" in found else ""


def columns_of(pairs: list[str]) -> dict[str, str | list[str]] | None:
    """``["prompt=question"]`` -> {"prompt": "question"}; a field named more than once gets a list; None when empty."""
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        field, equals, name = pair.partition("=")
        if not (field and equals and name):
            raise UserError(f"--column {pair!r}: expected FIELD=COLUMN, for example --column prompt=question")
        columns.setdefault(field, []).append(name)
    return {field: names[0] if len(names) == 1 else names for field, names in columns.items()} or None
