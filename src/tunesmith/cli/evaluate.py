"""``tunesmith evaluate MODEL --data FILE``: loss and figures on rows that the model was not trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from tunesmith.cli import garbage_collection, options
from tunesmith.cli.answer_progress import counts
from tunesmith.cli.output import filled_columns, print_result, print_stderr
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import interval_text, label, number


def evaluate(
    model: options.Model,
    data: Annotated[
        str | None, typer.Option(help="A data file, builtin:NAME, or hub:OWNER/NAME.", show_default="none")
    ] = None,
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
    task: options.Task = None,
    metric: options.Metrics = None,
    base: Annotated[
        bool, typer.Option(help="Let the base model of an adapter or a run answer, too, to compare with it.")
    ] = True,
    max_new_tokens: options.MaxNewTokens = 128,
    decode_weights: options.DecodeWeights = "stored",
    engine: options.Engine = None,
    served_model: options.ServedModel = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-evaluation-harness, or a task file (.yaml); may be repeated."),
    ] = None,
    harness_folder: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the report of a task head, or for answers: a second run goes on."),
    ] = None,
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Print loss, figures and speed of a model on a data file, or its figures on tasks of lm-evaluation-harness."""
    if harness:
        _evaluate_harness(model, harness, harness_folder, data, limit, precision, as_json)
        return
    if data is None or harness_folder is not None:
        missing = "--harness-folder needs --harness TASK" if data else "there is nothing to evaluate on"
        raise UserError(f"{missing}.\n  Type: tunesmith evaluate {model} --data FILE, or --harness TASK")
    columns, kwargs = options.parse_columns(column), options.parse_template_kwargs(template_kwarg)

    with garbage_collection.imports():
        from tunesmith.evaluate import evaluate_model
        from tunesmith.evaluate.evaluate_options import EvaluateOptions

    chosen = EvaluateOptions(
        objective=objective, format=format, columns=columns or None, separator=separator, template=template,
        template_kwargs=kwargs, max_length=max_length, overlong=overlong, bad_rows=bad_rows, limit=limit, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming, reference=reference, generate=generate,
        task=task, answer_metrics=metric or (), max_new_tokens=max_new_tokens, with_base=base, engine=engine,
        served_model=served_model, decode_weights=decode_weights, out=out,
    )  # fmt: skip
    with counts() as report:
        figures = evaluate_model.evaluate(
            model, data, chosen, on_answer=partial(report, "answers"),
            on_precision=lambda dtype: print_stderr(str(dtype), *options.describe_decode_weights(decode_weights)),
        )  # fmt: skip
    print_result(figures, as_json, _tables)


def _evaluate_harness(
    model: str, tasks: list[str], folder: Path | None, data: str | None, limit: int | None,
    precision: options.Precision, as_json: bool,
) -> None:  # fmt: skip
    """Print the figures of tasks of lm-evaluation-harness."""
    if data is not None:
        raise UserError(
            "--data does nothing with --harness, whose tasks have data of their own. Leave out one of the two."
        )
    from tunesmith.evaluate import harness

    names = [name for one in tasks for name in one.split(",") if name]
    result = harness.evaluate_harness(
        model, names, folder=folder, limit=limit, precision=precision,
        on_precision=lambda chosen: print_stderr(str(chosen)),
    )  # fmt: skip
    print_result(result, as_json, _harness_table)


def _harness_table(result: JsonObject) -> Table:
    rows = [
        (
            task,
            str(one["rows"] or ""),
            name,
            number(known["value"]),
            f"± {number(known['stderr'])}" if "stderr" in known else "",
        )
        for task, one in result["tasks"].items()
        for name, known in one["figures"].items()
    ]
    return filled_columns(
        ("task", "rows", "figure", "value", "standard error"), rows, "lm-evaluation-harness"
    )


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
            *(_answer_tables(figures["generated"]) if "generated" in figures else []),
        ]
    title = f"{figures['objective']}, {figures['rows']:,} examples{bad}"
    rows = []
    for name, value in figures.items():
        if name.startswith("eval_") and not name.endswith("_stderr"):
            one = assessed["figures"].get(name) or {}
            interval = interval_text(one)
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


def _answer_tables(generated: JsonObject) -> list[RenderableType]:
    """Figures of generated answers with interval and baselines, and what was not compared."""
    figures = generated["figures"]
    names = dict.fromkeys(known["words"] for one in figures.values() for known in one["baselines"])
    table = Table(
        "answers",
        "value",
        "95% interval",
        *(fill(name, 12) for name in names),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    words = {True: "better", False: "worse", None: "-"}
    for name, one in figures.items():
        known = {
            other["words"]: f"{other['value']:.3g} {words[other['better']]}" for other in one["baselines"]
        }
        table.add_row(
            label(name),
            number(one["value"]),
            interval_text(one),
            *(known.get(words_, "") for words_ in names),
        )
    title = f"\n{generated['answers']:,} answers to {generated['prompts']:,} prompts"
    legend = ["better, worse: than the baseline; -: no difference was seen"] if names else []
    return [title, table, "\n".join([*legend, *generated["cautions"]])]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
