"""``tunesmith compare A B [C ...] --data FILE``: which model is better on the same rows, and how sure is that?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import count, interval_text, label, number, signed


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Two models or more, of the same kind.")
    ],
    data: Annotated[str, typer.Option(help="A data file, builtin:NAME, or hub:OWNER/NAME.")],
    generate: Annotated[
        int, typer.Option(min=0, help="Prompts that language models answer; 0 = compare losses alone.")
    ] = 50,
    task: options.Task = None,
    metric: options.Metrics = None,
    max_new_tokens: options.MaxNewTokens = 128,
    limit: options.Limit = None,
    size: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="A difference: the verdict says how many rows would show it.",
            show_default="half of what was visible",
        ),
    ] = None,
    precision: options.Precision = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compare.html, figures.json and the answers; a second run goes on."),
    ] = None,
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Compare models on the same rows: every figure with its interval, and a verdict in words."""
    from tunesmith.evaluate import compare_models
    from tunesmith.report import compare_page

    result = compare_models.compare(
        models, data, generate=generate, task=task, metrics=metric or (), max_new_tokens=max_new_tokens, limit=limit, size=size,
        precision=precision, out=out, report=print_stderr,
    )  # fmt: skip
    if out is not None:
        compare_models.save(result, out)
        result["report"] = str(compare_page.write(out, result))
    print_result(result, as_json, _shown)


def _shown(result: JsonObject) -> list[RenderableType]:
    """The verdicts in words, facts of the models, and a table of the differences of each pair."""
    words = [*(one["verdict"] for one in result["pairs"]), *result["cautions"]]
    facts = [
        f"{one['name']}: {count(one['parameters'])} parameters, {count(one['bytes'])}B, "
        f"{number(one['tokens_per_second'])} tokens/s"
        for one in result["systems"]
    ]
    about = [f"{result['rows']:,} rows of {result['data']}", *facts]
    shown: list[RenderableType] = ["\n".join(words), "\n".join(about)]
    for pair in result["pairs"]:
        shown.append(f"\n{pair['first']} -> {pair['second']}")
        table = Table(
            "figure",
            "before",
            "after",
            "difference (95% interval)",
            "p",
            "",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name, one in pair["figures"].items():
            word = {True: "better", False: "worse", None: "-"}[one["better"]]
            change = f"{signed(one['value'])} ({interval_text(one, signed)})"
            table.add_row(
                label(name).removeprefix("answer "), number(one["before"]), number(one["after"]), change, f"{one['p']:.2g}", word,
            )  # fmt: skip
        shown.append(table)
    tail = ["-: no difference was seen"]
    tail += [f"rows that got worse: {pair['rows_worse']:,} of {pair['rows_worse'] + pair['rows_better']:,} that changed"
             for pair in result["pairs"] if "rows_worse" in pair]  # fmt: skip
    if "report" in result:
        tail.append(f"report: {result['report']}")
    return [*shown, "\n".join(tail)]
