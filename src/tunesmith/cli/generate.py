"""``tunesmith generate MODEL``: answer a prompt, or every prompt of a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from tunesmith.cli import options
from tunesmith.cli.output import console, json_line, print_result, print_stderr
from tunesmith.cli.predict import check_new_file
from tunesmith.errors import DataError, UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from tunesmith.data.rows import Message

_COLUMNS = ("messages", "conversations", "prompt", "instruction", "question", "q", "query", "input", "text")
"""Columns that may hold a row's prompt; the first one found is used."""

Prompt: TypeAlias = "str | list[Message]"
"""Text, or messages without the answer."""


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="Prompt to answer.")] = None,
    data: Annotated[str | None, typer.Option(help="Prompts: txt (one a line), json, csv, ...")] = None,
    limit: options.Limit = None,
    system: options.System = None,
    template_kwarg: options.TemplateKwargs = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same answers, whatever the batch.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 8,
    out: Annotated[Path | None, typer.Option(help="New jsonl file for prompts and answers.")] = None,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt, or every prompt of a file."""
    if (prompt is None) == (data is None):
        raise UserError("generate needs either --prompt TEXT or --data FILE")
    kwargs = options.parse_template_kwargs(template_kwarg)
    if kwargs and plain:
        raise UserError(
            "--template-kwarg does nothing with --plain, which uses no template. Leave out one of the two."
        )
    check_new_file(out)
    prompts: list[Prompt] = [prompt] if prompt is not None else read_prompts(str(data), limit)

    from rich.progress import Progress

    from tunesmith.data.encode.templates import apply_template
    from tunesmith.models.generate import decode
    from tunesmith.models.load.load import load

    settings: JsonObject = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings |= {"top_k": top_k, "seed": seed}
    decode.Settings(**settings)  # reports a wrong setting before the model is loaded
    print_stderr(f"loading {model}")
    pair = load(model)
    if kwargs:
        apply_template(pair[1], None, kwargs)
    with Progress(console=console(), transient=True, disable=data is None) as progress:
        task = progress.add_task("generating", total=len(prompts))
        answers = decode.generate(
            pair, prompts, system=system, plain=plain, batch_size=batch_size,
            on_answer=lambda row, answer: progress.advance(task), **settings,
        )  # fmt: skip
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(map(json_line, rows)), encoding="utf-8")
        print_stderr(f"{len(rows)} answers written to {out}")
    facts = {"model": model, "settings": settings, "answers": rows, "out": str(out) if out else None}
    print_result(facts, as_json, lambda _: None if out else _answers(rows))


def read_prompts(path: str, limit: int | None) -> list[Prompt]:
    """Read the prompts of a data file. Training files work too: the answer is left out.

    Raises DataError naming file, row and field.
    """
    from tunesmith.data.read.row_files import read
    from tunesmith.data.row_problems import RowProblem

    prompts = []
    for item in islice(read(path), limit):
        if isinstance(item, RowProblem):
            raise DataError(str(item))
        prompts.append(_prompt_of(item.value, f"{path}:{item.row}"))
    if not prompts:
        raise DataError(f"{path} has no prompts")
    return prompts


def _prompt_of(row: JsonObject, where: str) -> Prompt:
    from tunesmith.data.formats.fields import FieldFault, parse_json, require_text
    from tunesmith.data.formats.turns import parse_turns

    fields = {key.strip().casefold(): key for key in row}
    only_column = next(iter(fields)) if len(fields) == 1 else None
    column = next((name for name in _COLUMNS if name in fields), only_column)
    if column is None:
        raise DataError(
            f"{where}: no column is a prompt. Expected one of {', '.join(_COLUMNS)}; the row has {', '.join(row)}"
        )
    field = fields[column]
    value = row[field]
    try:
        if isinstance(value, list) or column in ("messages", "conversations"):
            turns = parse_turns(parse_json(value, field, "a list of turns"), field)
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            if not turns:
                raise FieldFault(field, "a turn to answer", "only answers", "Add the question.")
            return turns
        more = row.get(fields.get("input", ""), "") if column == "instruction" else ""
        return require_text(value, field) + (f"\n\n{more}" if isinstance(more, str) and more.strip() else "")
    except FieldFault as fault:
        raise DataError(
            f"{where}:{fault.field}: expected {fault.expected}, got {fault.got}. {fault.fix}"
        ) from None


def _answers(rows: list[JsonObject]) -> str:
    if len(rows) == 1:
        return str(rows[0]["answer"])
    return "\n\n".join(f"--- {_short_prompt(row['prompt'])}\n{row['answer']}" for row in rows)


def _short_prompt(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text if len(text) <= 100 else text[:97] + "..."
