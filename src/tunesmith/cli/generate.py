"""``tunesmith generate MODEL``: answer a prompt, or every prompt of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import __version__
from tunesmith.cli import adapter_flag, garbage_collection, options
from tunesmith.cli.answer_progress import AnswerProgress
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.cli.sampling_flags import SamplingFlags, with_flags
from tunesmith.errors import ServerError, UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.data_config import Source
    from tunesmith.data.read.prompts import AskedPrompt, PromptFile
    from tunesmith.evaluate.answer_prompts import Queue
    from tunesmith.models.generate.decode import Loaded
    from tunesmith.models.generate.vllm_backend import Vllm

SHOWN = 3
"""Answers that are printed when all are written to a file."""


@with_flags()
def generate(
    model: options.Model,
    sampling: SamplingFlags,
    prompt: Annotated[str | None, typer.Option(help="Prompt to answer.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer, read as training reads them.")] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-k", min=1, help="Answers to each prompt, each drawn by itself.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New jsonl file for prompts and answers; the same command continues it after a kill."
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin the file of --out again, whatever it was made with.")
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="An adapter that rows may name; may be repeated."),
    ] = None,
    adapter_column: Annotated[
        str | None, typer.Option(help="Column of --data with the name of each row's adapter; base: none.")
    ] = None,
    format: options.Format = None,
    column: options.Columns = None,
    limit: options.Limit = None,
    split: options.Split = "train",
    name: options.Name = None,
    system: options.System = None,
    template_kwarg: options.TemplateKwargs = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    precision: options.Precision = "auto",
    decode_weights: options.DecodeWeights = "stored",
    engine: options.Engine = None,
    served_model: options.ServedModel = None,
    max_running: Annotated[
        int | None,
        typer.Option(min=1, help="Answers generated at once.", show_default="as memory allows, at most 64"),
    ] = None,
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
    if samples > 1 and sampling.values["temperature"] == 0:
        raise UserError(
            f"-k {samples} with --temperature 0 gives the same answer {samples} times. Add --temperature 0.8, or "
            "leave out -k."
        )
    if bool(adapter) != bool(adapter_column) or (adapter and data is None):
        raise UserError(
            "--adapter NAME=FOLDER, --adapter-column COLUMN and --data FILE are used together. To answer with one "
            f"adapter, type its folder: tunesmith generate FOLDER instead of {model}"
        )
    if engine and decode_weights != "stored":
        raise UserError("--decode-weights is not supported with --engine. Leave out one of the two.")
    from tunesmith.data.read.prompts import AskedPrompt
    from tunesmith.evaluate import answer_file

    folders = adapter_flag.with_adapter_of_model(model, adapter_flag.parse_adapters(adapter or []))
    if out is not None:
        answer_file.check_target(out)
    asked: Iterable[AskedPrompt] = [AskedPrompt(1, prompt or "", None)]
    count = 1
    asked_from: JsonObject = {"prompt": prompt}
    if data is not None:
        reading = {"format": format, "columns": options.parse_columns(column) or None}
        source, file = _open(model, data, reading, limit=limit, split=split, name=name)
        file = replace(file, adapter_column=adapter_column, adapters=(*folders, adapter_flag.BASE))
        asked, count = file, _check(file)
        asked_from = {"data": _describe_data(source)}
        if folders:
            labels = {name: options.label(folder) for name, folder in folders.items()}
            asked_from |= {"adapters": labels, "adapter_column": adapter_column}

    from tunesmith.data.encode.templates import apply_template

    with garbage_collection.imports():
        from tunesmith.evaluate.answer_prompts import Queue

    facts: JsonObject = {"model": model}
    if engine is None and served_model is None:
        pair, tokenizers, facts["precision"] = _load(model, folders, precision)
        print_stderr(*options.describe_decode_weights(decode_weights))
        facts["decode_weights"], vllm = decode_weights, None
    else:
        vllm = _open_vllm(engine, model, served_model, precision, max_running, folders)
        pair, tokenizers, facts["engine"] = (vllm.network, vllm.tokenizer), {}, vllm.identity
    facts["settings"] = sampling.values
    for tokenizer in [one for one in tokenizers.values() if one.chat_template] or [pair[1]]:
        if kwargs:
            apply_template(tokenizer, None, kwargs)
    queue = Queue(
        pair, asked, count, sampling.params(pair), samples, system, plain, max_running, sampling.wants_logprobs,
        tokenizers, note=print_stderr, vllm=vllm, decode_weights=decode_weights,
    )  # fmt: skip
    for warning in queue.check():
        print_stderr(f"warning: {warning}")
    if out is None:
        facts |= _answer(queue, show=data is not None)
        print_result(facts, as_json, lambda facts: _answers(facts["answers"]))
        return
    made_with = {"tunesmith": __version__, "model": options.label(model), **queue.describe(), **asked_from}
    made_with |= {"template_kwargs": kwargs, "sampling": sampling.values}
    facts |= _answer_to_file(queue, out, made_with, restart)
    print_result(facts, as_json, lambda facts: f"{facts['rows']:,} answers written to {out}")


def _load(
    model: str, folders: Mapping[str, str], precision: str
) -> tuple[Loaded, Mapping[str, PreTrainedTokenizerBase], JsonObject]:
    """Load a model with its adapters. Returns it, the tokenizers of the adapters, and its precision."""
    from tunesmith.models.adapters.adapter_set import load_adapters
    from tunesmith.models.generate import decode
    from tunesmith.models.load.compute_dtype import cast_and_move
    from tunesmith.models.load.load import load

    print_stderr(f"loading {model}")
    several = load_adapters(model, folders) if folders else None
    pair = load(model) if several is None else (several.model, several.tokenizer)
    decode.check_writes(pair[0])
    chosen_dtype = cast_and_move(pair[0], precision)
    print_stderr(str(chosen_dtype))
    return pair, {} if several is None else several.tokenizers, chosen_dtype.as_dict()


def _open_vllm(
    engine: str | None, model: str, served: str | None, precision: str, most: int | None,
    folders: Mapping[str, str],
) -> Vllm:  # fmt: skip
    """Return the vLLM that answers. Raises UserError."""
    if engine is None:
        raise UserError("--served-model needs --engine ADDRESS. Leave it out, or name the address.")
    if folders:
        raise UserError(
            "--adapter is not supported with --engine, which has one model. Leave out one of the two."
        )
    from tunesmith.models.generate.vllm_backend import open_vllm

    print_stderr(f"tokens and settings of {model}; answers by vLLM: {engine}")
    return open_vllm(engine, model, served, precision, most)


def _open(model: str, data: str, reading: JsonObject, **keys: object) -> tuple[Source, PromptFile]:
    """Open the prompts of a file, read with the columns of the model's training. Raises UserError."""
    from tunesmith.data.read import prompts
    from tunesmith.evaluate import trained_reading

    trained = trained_reading.trained_with(model)
    source = trained_reading.source_as_trained(trained, data, prompts.ROWS, reading, keys, prompts=True)
    return source, prompts.open_prompts(source, trained.get("rows") or ())


def _check(file: PromptFile) -> int:
    """Read the whole file once and return the number of its prompts. Raises DataError with all bad rows."""
    count, known = file.check()
    print_stderr(f"{file.description}; {count:,} prompts, {known:,} with an answer to compare")
    return count


def _describe_data(source: Source) -> JsonObject:
    from tunesmith.data.store.encode_source import content_hash

    keys = source.model_dump(exclude_defaults=True) | {"path": options.label(source.path)}
    return {**keys, "sha256": content_hash(source)}


def _answer(queue: Queue, show: bool) -> JsonObject:
    """Return the answers of a queue in order, and its summary. ``show``: show the progress."""
    total = queue.count * queue.samples
    lines: dict[int, JsonObject] = {}
    with AnswerProgress(total if show else 0, queue) as progress:
        for index, line in queue.run():
            lines[index] = line
            progress.add(line["tokens"])
    answers = [lines[index] for index in range(total)]
    return {"answers": answers, "summary": _summary(queue, progress), "out": None}


def _answer_to_file(queue: Queue, out: Path, made_with: JsonObject, restart: bool) -> JsonObject:
    """Write the answers of a queue to ``out``, or continue it. Returns the first few, and the summary."""
    from tunesmith.evaluate.answer_file import AnswerFile, partial_path, read_first

    total = queue.count * queue.samples
    kept = AnswerFile(out, made_with, total, queue.block_prompts * queue.samples, queue.is_exact, restart)
    progress = AnswerProgress(0, queue)
    try:
        with kept:
            if kept.complete:
                print_stderr(f"{out} is complete: it was made by this command")
            elif kept.done:
                print_stderr(f"continuing {partial_path(out)}: {kept.done:,} of {total:,} answers are there")
            if not kept.complete:
                with AnswerProgress(total, queue, kept.done) as progress:
                    for index, line in queue.run(kept.has):
                        kept.add(index, line)
                        progress.add(line["tokens"])
                kept.finish()
    except (KeyboardInterrupt, ServerError):
        print_stderr(
            f"{kept.done:,} of {total:,} answers are kept in {partial_path(out)}. Type the same command to continue."
        )
        raise
    first = read_first(out, SHOWN)
    return {"rows": total, "first": first, "summary": _summary(queue, progress), "out": str(out)}


def _summary(queue: Queue, progress: AnswerProgress) -> JsonObject:
    """Print seconds and tokens of this command, and return them."""
    from tunesmith.evaluate.answer_prompts import speed

    facts = {"answers": progress.answers, "tokens": progress.tokens, **speed(queue.timing)}
    if progress.answers:
        prefill, decode = (
            f"{facts[f'{part}_seconds']:.1f} s, {facts[f'{part}_tokens_per_second'] or 0:,.0f} tokens/s"
            for part in ("prefill", "decode")
        )
        before = f"prefill of {facts['prefill_tokens']:,} tokens: {prefill}; decoding: "
        print_stderr(
            f"{progress.answers:,} {'answer' if progress.answers == 1 else 'answers'}, {progress.tokens:,} tokens; "
            f"{before if queue.vllm is None else ''}{decode}"
        )
    return facts


def _answers(rows: list[JsonObject]) -> str:
    if len(rows) == 1:
        return str(rows[0]["answer"])
    return "\n\n".join(f"--- {_short_prompt(row['prompt'])}\n{row['answer']}" for row in rows)


def _short_prompt(prompt: str | list[JsonObject]) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text if len(text) <= 100 else text[:97] + "..."
