"""``tunesmith score MODEL --data FILE [--out FILE]``: the reward of every answer, and their ranking."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli import options
from tunesmith.cli.predict import write_predictions


def score(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Prompts with one answer, chosen and rejected, or a list.")],
    out: options.Predictions = None,
    format: options.Format = None,
    column: options.Columns = None,
    limit: options.Limit = None,
    template_kwarg: options.TemplateKwargs = None,
    max_length: options.MaxLength = None,
    precision: options.Precision = "auto",
    batch_tokens: options.BatchTokens = 2048,
    split: options.Split = "train",
    name: options.Name = None,
    streaming: options.Streaming = False,
    as_json: options.Json = False,
) -> None:
    """Score every answer with a reward model and rank several, best first. Labels in the file are ignored."""
    kwargs = options.parse_template_kwargs(template_kwarg)
    write_predictions(
        model, data, out, "scoring", as_json, column, format=format, limit=limit, max_length=max_length, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming, template_kwargs=kwargs,
    )  # fmt: skip
