"""``tunesmith pipeline FILE [STAGE.KEY=VALUE ...]``: train the stages of a pipeline in order."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from tunesmith.cli import garbage_collection, options
from tunesmith.cli.output import console, filled_columns, print_result, print_stderr
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import duration, is_number, label, number

_DONE = {"train": "trained", "resume": "resumed"}


def pipeline(
    file: Annotated[Path, typer.Argument(help="YAML file with `stages`; see docs/pipeline.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Such as sft.train.epochs=2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all stages.", show_default="runs/NAME of the file")
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Keep the results before this stage as they are."),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all stages and print the plan.")] = False,
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Train the stages of a pipeline in order. A stage that did not change since it was trained is left alone;
    an interrupted one continues from its last checkpoint."""
    from tunesmith.pipeline import pipeline_file

    # read before the import of torch, which takes seconds
    read = pipeline_file.read(file, (out or Path("runs") / file.stem).resolve(), overrides or ())
    with garbage_collection.imports():
        from tunesmith.pipeline import run_stages

    facts = run_stages.run_pipeline(
        read, first=first, last=last, dry_run=dry_run, console=console(), note=print_stderr
    )
    print_result(facts, as_json, _plan if dry_run else _summary)


def _plan(facts: JsonObject) -> str:
    width = max(len(one["stage"]) for one in facts["plan"])
    return "\n".join(
        f"{one['stage']:<{width}}  {one['action']:<9}  {'; '.join(one['reasons'])}".rstrip()
        for one in facts["plan"]
    )


def _summary(facts: JsonObject) -> list[RenderableType]:
    """Return a table of the stages and one of their answers, then the paths."""
    rows = [
        [
            stage["stage"],
            stage["objective"],
            Path(str(stage["model"])).name,
            _DONE.get(stage["action"], stage["action"]),
            "; ".join(_change(name, *both) for name, both in list((stage.get("figures") or {}).items())[:2]),
            duration(stage["train_seconds"]) if is_number(stage.get("train_seconds")) else "",
        ]
        for stage in facts["stages"]
    ]
    shown: list[RenderableType] = [
        filled_columns(("stage", "objective", "trained from", "now", "held-out rows", "time"), rows, "Stages")
    ]
    if comparison := facts["comparison"]:
        heads = list(dict.fromkeys(key for row in comparison["models"] for key in row))
        cells = [[_cell(row.get(key)) for key in heads] for row in comparison["models"]]
        shown.append(
            filled_columns(heads, cells, f"Answers to the same {len(comparison['prompts'])} prompts")
        )
    written = [stage for stage in facts["stages"] if stage.get("model_dir")]
    lines = [f"model      {written[-1]['model_dir']}"] if written else []
    return [*shown, "\n".join([*lines, f"report     {facts['report']}", *_next(written)])]


def _next(stages: list[JsonObject]) -> list[str]:
    return [f"next       tunesmith show {shlex.quote(str(stages[-1]['run_dir']))}"] if stages else []


def _change(name: str, before: object, after: object) -> str:
    return f"{label(name)} {_cell(before)} -> {_cell(after)}"


def _cell(value: object) -> str:
    return number(value) if is_number(value) else str(value or "-")
