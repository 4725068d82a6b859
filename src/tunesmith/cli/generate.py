"""``tunesmith generate MODEL``: answer a prompt, or every prompt of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import files
from tunesmith.cli import options
from tunesmith.cli.output import console, json_line, print_result, print_stderr
from tunesmith.cli.predict import check_new_file
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from tunesmith.data.read.prompts import AskedPrompt
    from tunesmith.models.generate.decode import Loaded


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="Prompt to answer.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer, read as training reads them.")] = None,
    format: options.Format = None,
    column: options.Columns = None,
    limit: options.Limit = None,
    split: options.Split = "train",
    name: options.Name = None,
    system: options.System = None,
    template_kwarg: options.TemplateKwargs = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same answers, whatever the batch.")] = 0,
    precision: options.Precision = "auto",
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 8,
    out: Annotated[Path | None, typer.Option(help="New jsonl file for prompts and answers.")] = None,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt, or every prompt of a file. Answers in the file are kept next to the model's."""
    if (prompt is None) == (data is None):
        raise UserError("generate needs either --prompt TEXT or --data FILE")
    kwargs = options.parse_template_kwargs(template_kwarg)
    if kwargs and plain:
        raise UserError(
            "--template-kwarg does nothing with --plain, which uses no template. Leave out one of the two."
        )
    check_new_file(out)
    from tunesmith.data.read.prompts import AskedPrompt

    asked = [AskedPrompt(1, prompt or "", None)]
    if data is not None:
        reading = {"format": format, "columns": options.parse_columns(column) or None}
        asked = _read(model, data, reading, limit=limit, split=split, name=name)

    from rich.progress import Progress

    from tunesmith.data.encode.templates import apply_template
    from tunesmith.models.generate import decode
    from tunesmith.models.generate.sampling import SamplingParams
    from tunesmith.models.load.compute_dtype import cast_and_move
    from tunesmith.models.load.load import load

    settings: JsonObject = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings |= {"top_k": top_k, "seed": seed}
    SamplingParams(**settings)  # reports a wrong setting before the model is loaded
    print_stderr(f"loading {model}")
    pair = load(model)
    chosen_dtype = cast_and_move(pair[0], precision)
    print_stderr(str(chosen_dtype))
    if kwargs:
        apply_template(pair[1], None, kwargs)
    _warn_of_omitted_text(asked, pair)
    with Progress(console=console(), transient=True, disable=data is None) as progress:
        task = progress.add_task("generating", total=len(asked))
        answers = decode.generate(
            pair, [one.prompt for one in asked], system=system, plain=plain, max_running=batch_size,
            on_answer=lambda row, answer: progress.advance(task), **settings,
        )  # fmt: skip
    rows = [_answered(one, answer) for one, answer in zip(asked, answers, strict=True)]
    if out is not None:
        files.make_folder(out.parent)
        files.replace_file(out, "".join(map(json_line, rows)).encode())
        print_stderr(f"{len(rows)} answers written to {out}")
    facts: JsonObject = {"model": model, "precision": chosen_dtype.as_dict()}
    facts |= {"settings": settings, "answers": rows}
    facts["out"] = str(out) if out else None
    print_result(facts, as_json, lambda _: None if out else _answers(rows))


def _read(model: str, data: str, reading: JsonObject, **keys: object) -> list[AskedPrompt]:
    """Return the prompts of a file, read with the columns of the model's training. Raises UserError."""
    from tunesmith.data.read import prompts
    from tunesmith.evaluate import trained_reading

    trained = trained_reading.trained_with(model)
    source = trained_reading.source_as_trained(trained, data, prompts.ROWS, reading, keys, prompts=True)
    asked, description = prompts.read_prompts(source, trained.get("rows") or ())
    known = sum(one.reference is not None for one in asked)
    print_stderr(
        f"{source.label}: {description}; {len(asked):,} prompts, {known:,} with an answer to compare"
    )
    return asked


def _warn_of_omitted_text(asked: list[AskedPrompt], pair: Loaded) -> None:
    """Warn of prompts whose text or tools the chat template leaves out, with an example."""
    from tunesmith.data.encode.conversations import find_omitted_text
    from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer
    from tunesmith.data.rows import Chat

    tokenizer = pair[1]
    if not tokenizer.chat_template:
        return
    renderer = Renderer(tokenizer)
    chats = [(one.row, one.prompt) for one in asked if isinstance(one.prompt, Chat)]
    try:
        losing = [(row, omitted) for row, chat in chats if (omitted := find_omitted_text(chat, renderer))]
    except RENDER_ERRORS:  # the template refuses the conversation; generation reports that
        return
    if losing:
        row, omitted = losing[0]
        print_stderr(
            f"warning: the chat template leaves out text of {len(losing):,} prompts; of row {row}: {'; '.join(omitted)}"
        )


def _answered(asked: AskedPrompt, answer: str) -> JsonObject:
    """Return one line of ``--out``: row, prompt, answer, and the data's answer as ``reference``."""
    known = asked.as_dict()
    reference = {"reference": known.pop("reference")} if "reference" in known else {}
    return {**known, "answer": answer, **reference}


def _answers(rows: list[JsonObject]) -> str:
    if len(rows) == 1:
        return str(rows[0]["answer"])
    return "\n\n".join(f"--- {_short_prompt(row['prompt'])}\n{row['answer']}" for row in rows)


def _short_prompt(prompt: str | list[JsonObject]) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text if len(text) <= 100 else text[:97] + "..."
