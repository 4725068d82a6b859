"""``tunesmith generate MODEL``: answer a prompt, or every prompt of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import console, result, say
from tunesmith.errors import DataError, UserError

_COLUMNS = ("messages", "conversations", "prompt", "instruction", "question", "q", "query", "input", "text")
"""Where a row keeps its prompt, in the order in which they are looked for."""


def generate(
    model: Annotated[
        str, typer.Argument(help="Catalog name, model, adapter or run folder.", show_default=False)
    ],
    prompt: Annotated[str | None, typer.Option(help="What to answer.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File of prompts: txt (one a line), json, jsonl, csv, tsv.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first N prompts only.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with this share together.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same answers, whatever the batch.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Write prompts and answers to this new jsonl file.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Answer a prompt, or every prompt of a file."""
    if (prompt is None) == (data is None):
        raise UserError("give one of --prompt TEXT and --data FILE")
    if out is not None and out.exists():
        raise UserError(f"{out} exists already; name a new file with --out, or remove it")
    prompts: list[Any] = [prompt] if data is None else prompts_of(data, limit)

    from rich.progress import Progress

    from tunesmith.models.generate import decode as engine
    from tunesmith.models.load.load import load

    chosen: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    engine.Settings(**chosen)  # a wrong setting is told before the model is loaded
    say(f"loading {model}")
    pair = load(model)
    with Progress(console=console(), transient=True, disable=data is None) as progress:
        task = progress.add_task("generating", total=len(prompts))
        answers = engine.generate(
            pair,
            prompts,
            system=system,
            plain=plain,
            batch_size=batch_size,
            on_answer=lambda row, answer: progress.advance(task),
            **chosen,
        )
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        say(f"{len(rows)} answers written to {out}")
    found = {"model": model, "settings": chosen, "answers": rows, "out": str(out) if out else None}
    result(found, as_json, lambda _: None if out else _shown(rows))


def prompts_of(path: str, limit: int | None) -> list[Any]:
    """The prompts of a data file: strings, or message lists without the answer. Rows of training files will do.

    Raises DataError naming file, row and field.
    """
    from itertools import islice

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


def _prompt_of(row: dict[str, Any], where: str) -> Any:
    from tunesmith.data.formats.fields import FieldFault, parse_json, require_text
    from tunesmith.data.formats.turns import parse_turns

    named = {key.strip().casefold(): key for key in row}
    column = next(
        (name for name in _COLUMNS if name in named), next(iter(named)) if len(named) == 1 else None
    )
    if column is None:
        raise DataError(
            f"{where}: no column is a prompt. Expected one of {', '.join(_COLUMNS)}; the row has {', '.join(row)}"
        )
    field = named[column]
    value = row[field]
    try:
        if isinstance(value, list) or column in ("messages", "conversations"):
            turns = parse_turns(parse_json(value, field, "a list of turns"), field)
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            if not turns:
                raise FieldFault(field, "a turn to answer", "only answers", "Add the question.")
            return turns
        more = row.get(named.get("input", ""), "") if column == "instruction" else ""
        return require_text(value, field) + (f"\n\n{more}" if isinstance(more, str) and more.strip() else "")
    except FieldFault as fault:
        raise DataError(
            f"{where}:{fault.field}: expected {fault.expected}, got {fault.got}. {fault.fix}"
        ) from None


def _shown(rows: list[dict[str, Any]]) -> str:
    if len(rows) == 1:
        return str(rows[0]["answer"])
    return "\n\n".join(f"--- {_line(row['prompt'])}\n{row['answer']}" for row in rows)


def _line(prompt: Any) -> str:
    said = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return said if len(said) <= 100 else said[:97] + "..."
