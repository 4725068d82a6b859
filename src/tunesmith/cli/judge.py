"""``tunesmith judge A [B ...] --judge JUDGE --out FOLDER``: which of several systems answers better?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.answer_progress import counts
from tunesmith.cli.output import print_result
from tunesmith.json_types import JsonObject


def judge(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM...",
            help="Models, answer files of `tunesmith generate --out`, or `reference`: the data's answers.",
        ),
    ],
    judge: Annotated[
        str,
        typer.Option(help="Model that judges, or the address of a server, such as http://127.0.0.1:8000/v1."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of answers, verdicts and the report; a second run goes on.")
    ],
    data: Annotated[str | None, typer.Option(help="Prompts to answer, if a system is a model.")] = None,
    human: Annotated[
        str | None, typer.Option(help="Answers that people ranked, to examine the judge in addition.")
    ] = None,
    rubric: Annotated[
        str | None,
        typer.Option(
            help="Score each answer from 1 to 5: `general`, or a text file that says what makes an answer good.",
            show_default="choose between two answers",
        ),
    ] = None,
    limit: options.Limit = None,
    max_new_tokens: options.MaxNewTokens = 256,
    judge_model: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "OPENAI_API_KEY",
    precision: options.Precision = "auto",
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Judge answers in pairs, in both orders. A judge that fails its examination names no winner."""
    from tunesmith.judge import judge_run
    from tunesmith.report import judge_page

    with counts() as report:
        result = judge_run.judge(
            systems, judge, out, data=data, human=human, limit=limit, max_new_tokens=max_new_tokens,
            judge_model=judge_model, key_variable=key_variable, rubric=rubric, precision=precision,
            report=report,
        )  # fmt: skip
    result["report"] = str(judge_page.write(out, result))
    print_result(result, as_json, _shown)


def _shown(result: JsonObject) -> list[RenderableType]:
    """The verdicts in words, then the figures of the judge."""
    from tunesmith.report import judge_page

    examined, cost = result["examination"], result["cost"]
    lines = [one["verdict"] for one in result["comparisons"]]
    lines += [f"on length: {one['length']}" for one in result["comparisons"] if one["length_controlled"]]
    table = Table(
        "examination of the judge", "value", "expected", title=result["judge"], title_justify="left"
    )
    for name, value, expected in judge_page.examination_rows(examined):
        table.add_row(name, value, expected)
    failures = [f"the judge failed: {failure}" for failure in examined["failures"]]
    spent = (
        f"{cost['calls']:,} verdicts in {cost['seconds']:.1f} s, {cost['tokens']:,} tokens; "
        f"{cost['reused']:,} read from {result['report'].rpartition('/')[0]}/judgements.jsonl"
    )
    return ["\n".join(lines), table, "\n".join([*failures, spent, f"report: {result['report']}"])]
