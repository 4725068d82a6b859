"""``tunesmith data preview | lint``: look at rows as the model will see them, and find every bad one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import output

if TYPE_CHECKING:
    from tunesmith.data.config import DataConfig, Source
    from tunesmith.data.lint import LintReport

app = typer.Typer(add_completion=False, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Format = Annotated[str | None, typer.Option("--format", help="Name the format instead of detecting it.")]
Template = Annotated[str | None, typer.Option("--template", help="alpaca, chatml, roles, korean, or a Jinja string.")]


@app.command("preview")
def preview(
    target: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="A data file, builtin:docstrings, or a recipe (.yaml).")],
    model: Annotated[str | None, typer.Option("--model", help="Whose tokenizer; a recipe names its own.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each source.")] = 3,
    train_on: Annotated[str | None, typer.Option("--train-on", help="completion, assistant or all.")] = None,
    format: Format = None,
    template: Template = None,
    json: Json = False,
) -> int:
    """Show rows as the model will see them, what is learnt in green, with the counts."""
    from tunesmith.data import preview as previews
    from tunesmith.errors import UserError
    from tunesmith.models.load import load_tokenizer, locate

    sources, config, objective, named = _target(target, format, train_on)
    if model is None and named is None:
        raise UserError("data preview needs a tokenizer. Say whose: --model smollm2-135m, or a model folder")
    tokenizer = load_tokenizer(locate(model or named or ""))
    chosen = template or (config.template if config else None)
    shown = [previews.preview(source, objective, tokenizer, chosen, rows) for source in sources]
    output.result({"sources": [item.as_dict() for item in shown]}, json, human=lambda _: _preview_lines(shown))
    return 0


@app.command("lint")
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE|RECIPE...", help="Data files, or one recipe (.yaml).")],
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out files: compared with FILE for duplicates.")
    ] = None,
    format: Format = None,
    model: Annotated[str | None, typer.Option("--model", help="Render each row with this model's template, too.")] = None,
    template: Template = None,
    json: Json = False,
) -> int:
    """List every bad row as file:row:field, what was expected, what is there and how to mend it; and duplicates."""
    from tunesmith.data import lint as linting
    from tunesmith.data.config import Source
    from tunesmith.data.source import ROW_TYPES, eval_source
    from tunesmith.data.templates import apply_template
    from tunesmith.models.load import load_tokenizer, locate

    train: list[Source] = []
    held = [Source(path=path, format=format) for path in evaluation or ()]
    accepted: tuple[type, ...] = ROW_TYPES
    for name in files:
        sources, config, objective, _ = _target(name, format, None)
        train += sources
        if config is not None:
            accepted = tuple(objective.rows)
            template = template or config.template
            own = eval_source(config.eval)
            held += [own] if own else []
    tokenizer = apply_template(load_tokenizer(locate(model)), template)[0] if model else None
    report = linting.lint(train, held, accepted, tokenizer)
    output.result(report.as_dict(), json, human=lambda _: _lint_lines(report))
    return 0 if report.ok else 2


def _target(target: str, format: str | None, train_on: str | None) -> tuple[list[Source], DataConfig | None, Any, str | None]:
    """(sources, the recipe's data keys, the objective, the recipe's model) of a data file or a recipe."""
    from tunesmith import objectives, recipe
    from tunesmith.data.config import Source

    if target.endswith((".yaml", ".yml")):
        loaded = recipe.load(target, [f"objective.train_on={train_on}"] if train_on else [])
        kind = objectives.module(objectives.name_of(loaded.objective))
        return list(loaded.data.train), loaded.data, kind.Objective(loaded.objective), loaded.model
    raw = {"model": "-", "data": {"train": [{"path": target, "format": format}]}, "objective": "sft"}
    checked = recipe.parse(raw, [f"objective.train_on={train_on}"] if train_on else [], where="data")
    sft = objectives.module("sft")
    return [Source(path=target, format=format)], None, sft.Objective(checked.objective), None


def _preview_lines(shown: list[Any]) -> list[Any]:
    lines: list[Any] = []
    for item in shown:
        lines.append(f"{item.path}: {item.format}\ntemplate: {item.template}")
        for row in item.shown:
            lines += [f"--- {row.where}: {row.supervised} of {row.tokens} tokens learnt", row.coloured()]
        lines += [f"bad row: {problem}" for problem in item.problems]
    return lines


def _lint_lines(report: LintReport) -> list[str]:
    lines = [str(problem) for problem in report.problems]
    lines += [f"{item.where}: also a training row, {item.same_as}. Remove one of them." for item in report.leaked]
    lines += [f"remark: {item.where} repeats {item.same_as}" for item in report.duplicates]
    lines += [f"remark: {place} is left out by the chat template" for place in report.left_out]
    for file in report.files:
        lines.append(f"{file.path}: {file.format}; {file.rows} rows = {file.kept} kept + {file.rejected} rejected")
    lines.append(
        "no bad rows" if report.ok else f"{len(report.problems)} problems, {len(report.leaked)} rows in both train and eval"
    )
    return lines
