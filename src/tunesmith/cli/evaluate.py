"""``tunesmith evaluate MODEL --data FILE``: loss and figures on rows that the model was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import RenderableType
from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.output import filled_columns, print_result, print_stderr
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import label, number


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(help="A data file, builtin:NAME, or hub:OWNER/NAME.")],
    objective: Annotated[
        str | None, typer.Option(help="The loss: sft, cpt, dpo, ...", show_default="that of training")
    ] = None,
    format: options.Format = None,
    column: options.Columns = None,
    separator: Annotated[str | None, typer.Option(help="Separator of labels in a cell, such as '|'.")] = None,
    template: options.Template = None,
    template_kwarg: options.TemplateKwargs = None,
    max_length: options.MaxLength = None,
    overlong: Annotated[
        str | None,
        typer.Option(help="Longer rows: error, drop, truncate, split.", show_default="the objective's own"),
    ] = None,
    bad_rows: Annotated[
        Literal["error", "skip"],
        typer.Option(help="Rows that cannot be read: stop, or leave them out and count them."),
    ] = "error",
    limit: options.Limit = None,
    precision: options.Precision = "auto",
    batch_tokens: options.BatchTokens = 2048,
    split: options.Split = "train",
    name: options.Name = None,
    streaming: options.Streaming = False,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Policy that dpo and kto compare with.", show_default="the model that training started from"
        ),
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Prompts that a language model answers.")] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric of the answers; may be repeated.", show_default="all"),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the report of a task head, or for answers: a second run goes on."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print loss, figures and speed of a model on a data file."""
    columns, kwargs = options.parse_columns(column), options.parse_template_kwargs(template_kwarg)

    from tunesmith.evaluate import evaluate_model

    figures = evaluate_model.evaluate(
        model, data, objective=objective, format=format, columns=columns or None, separator=separator, template=template,
        template_kwargs=kwargs, max_length=max_length, overlong=overlong, bad_rows=bad_rows, limit=limit, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming,
        reference=reference, generate=generate, answer_metrics=metric or (), max_new_tokens=max_new_tokens,
        out=out, on_precision=lambda chosen: print_stderr(str(chosen)),
    )  # fmt: skip
    print_result(figures, as_json, _tables)


def _tables(figures: JsonObject) -> list[RenderableType]:
    """Figures, those of each class or type, speed, and the path of the report."""
    bad = f", {figures['bad_rows']:,} bad rows left out" if "bad_rows" in figures else ""
    stderr = f" ± {figures['eval_loss_stderr']:.4f}" if "eval_loss_stderr" in figures else ""
    speed = f"speed       {figures['tokens_per_second']:.0f} tokens/s, {figures['seconds']:.1f} s"
    assessed = figures.get("assessment") or {"verdict": [], "figures": {}}
    verdict = [f"verdict     {line}" for line in assessed["verdict"]]
    if "perplexity" in figures:
        return [
            f"eval loss   {figures['eval_loss']:.4f}{stderr} per supervised token\n"
            f"perplexity  {figures['perplexity']:.3f}\n"
            f"read        {figures['rows']:,} rows, {figures['tokens']:,} tokens, "
            f"{figures['supervised_tokens']:,} of them supervised{bad}\n{speed}",
            *([_answer_table(figures["generated"])] if "generated" in figures else []),
        ]
    title = f"{figures['objective']}, {figures['rows']:,} examples{bad}"
    rows = []
    for name, value in figures.items():
        if name.startswith("eval_") and not name.endswith("_stderr"):
            one = assessed["figures"].get(name) or {}
            interval = f"{number(one['low'])} to {number(one['high'])}" if "low" in one else ""
            known = one.get("baseline")
            baseline = f"{number(known['value'])}, {known['words']}" if known else ""
            rows.append(
                (label(name), f"{value:.4f}{stderr if name == 'eval_loss' else ''}", interval, baseline)
            )
    table = filled_columns(("figure", "value", "95% interval", "baseline"), rows, title)
    tables: list[RenderableType] = [table]
    details = figures.get("details") or {}
    groups = details.get("per_class") or details.get("by_type") or details.get("by_length") or {}
    if groups:
        columns = list(dict.fromkeys(key for values in groups.values() for key in values))
        heads = (column.replace("_", " ") for column in columns)
        table = Table("", *heads, title="each", title_justify="left")
        for name, values in groups.items():
            table.add_row(str(name), *(_cell(values.get(column)) for column in columns))
        tables.append(table)
    report = [f"report      {figures['report']}"] if "report" in figures else []
    return [*tables, "\n".join([*verdict, speed, *report])]


def _answer_table(generated: JsonObject) -> Table:
    """Figures of generated answers with interval and baseline."""
    rows = []
    for name, one in generated["figures"].items():
        interval = f"{number(one['low'])} to {number(one['high'])}" if "low" in one else ""
        known = one.get("baseline")
        word = {True: "better", False: "worse", None: "no difference seen"}[known["better"]] if known else ""
        baseline = f"{number(known['value'])}, {known['words']}: {word}" if known else ""
        rows.append((label(name), number(one["value"]), interval, baseline, one["words"]))
    title = f"{generated['answers']:,} answers to {generated['prompts']:,} prompts"
    return filled_columns(("answers", "value", "95% interval", "baseline", "meaning"), rows, title)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
