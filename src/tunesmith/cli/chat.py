"""``tunesmith chat MODEL``: chat with a model; answers stream, the conversation is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import adapter_flag, garbage_collection, options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.cli.sampling_flags import SamplingFlags, with_flags
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from tunesmith.data.rows import Message
    from tunesmith.models.adapters.adapter_set import Adapters
    from tunesmith.models.generate.engine import Engine
    from tunesmith.models.generate.sampling import SamplingParams

_HELP = (
    "Commands: /reset clears the conversation, /system TEXT also sets the system message, /help shows this, /exit ends. "
    "Ctrl-C stops an answer."
)
_SWITCH = "/adapter NAME switches to another adapter and keeps the conversation; there are {names}."


@with_flags(max_new_tokens=512, temperature=0.7, top_p=0.9)
def chat(
    model: options.Model,
    sampling: SamplingFlags,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="An adapter to switch to; may be repeated."),
    ] = None,
    system: options.System = None,
    template_kwarg: options.TemplateKwargs = None,
    precision: options.Precision = "auto",
    decode_weights: options.DecodeWeights = "stored",
    as_json: Annotated[bool, typer.Option("--json", help="Print the conversation as JSON.")] = False,
) -> None:
    """Chat with a model. Reads lines from the terminal or from a pipe.

    Lines that begin with / are commands: /reset clears the conversation, /system TEXT also sets the system
    message, /adapter NAME switches to an adapter of --adapter (base: none), /help lists the commands, /exit ends.
    Ctrl-C stops an answer and keeps what there is of it; Ctrl-D ends.
    """
    with garbage_collection.imports():
        from tunesmith.data.encode.templates import apply_template
        from tunesmith.models.adapters.adapter_set import load_adapters
        from tunesmith.models.generate import decode
        from tunesmith.models.generate.engine import Engine
        from tunesmith.models.load.compute_dtype import cast_and_move
        from tunesmith.models.load.load import load

    kwargs = options.parse_template_kwargs(template_kwarg)
    folders = adapter_flag.with_adapter_of_model(model, adapter_flag.parse_adapters(adapter or []))
    print_stderr(f"loading {model}")
    adapters = load_adapters(model, folders) if folders else None
    pair = load(model) if adapters is None else (adapters.model, adapters.tokenizer)
    decode.check_writes(pair[0])
    chosen_dtype = cast_and_move(pair[0], precision)
    print_stderr(str(chosen_dtype), *options.describe_decode_weights(decode_weights))
    if not pair[1].chat_template:
        raise UserError(f"{model} has no chat template. Use `tunesmith generate {model} --prompt ...`.")
    for tokenizer in [pair[1]] if adapters is None else adapters.tokenizers.values():
        if kwargs and tokenizer.chat_template:
            apply_template(tokenizer, None, kwargs)
    params = sampling.params(pair)
    print_stderr(_HELP)
    if adapters is not None:
        print_stderr(_SWITCH.format(names=", ".join(adapters.names)), f"adapter: {adapters.active}")
    engine = Engine(*pair, note=print_stderr, decode_weights=decode_weights)
    turns: list[Message] = []
    answers: list[JsonObject] = []
    for line in _read_lines():
        command, _, rest = line.partition(" ")
        argument = rest.strip()
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            system = argument or None if command == "/system" else system
            turns, answers = [], []
            print_stderr("cleared" if command == "/reset" else f"system message: {system or 'none'}")
        elif command == "/adapter" and adapters is not None:
            _switch_adapter(adapters, argument)
            engine = Engine(adapters.model, adapters.tokenizer, decode_weights=decode_weights)
            params = sampling.params((adapters.model, adapters.tokenizer))
        elif line.startswith("/"):
            if command != "/help":
                print_stderr(f"there is no command {command}")
            print_stderr(_HELP, *([_SWITCH.format(names=", ".join(adapters.names))] if adapters else []))
        else:
            messages: list[Message] = [*turns, {"role": "user", "content": line}]
            rule = replace(params, seed=params.seed + len(turns))
            answered = _answer(engine, messages, system, rule, sampling.wants_logprobs)
            if answered is not None:
                turns = [*messages, {"role": "assistant", "content": answered.pop("answer")}]
                answers.append(answered)
    if as_json:
        first = [{"role": "system", "content": system}] if system else []
        facts = {"model": model, "adapter": adapters and adapters.active, "precision": chosen_dtype.as_dict()}
        facts |= {"decode_weights": decode_weights}
        print_result(
            {**facts, "settings": sampling.values, "messages": first + turns, "answers": answers}, True
        )


def _answer(
    engine: Engine,
    messages: list[Message],
    system: str | None,
    params: SamplingParams,
    wants_logprobs: bool,
) -> JsonObject | None:
    """Print an answer as it comes and return it with its figures; None if the window is too small for it.

    Ctrl-C ends the answer; the text until then is kept."""
    from tunesmith.evaluate.answer_prompts import speed, token_logprobs
    from tunesmith.models.generate import decode
    from tunesmith.models.generate.running_rows import Request
    from tunesmith.models.generate.slots import Timing

    pieces: list[str] = []

    def print_piece(request: Request, token: int, piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)  # under --json sys.stdout is stderr: stdout carries the result alone

    before, reason, tokens = astuple(engine.timing), "interrupted", 0
    logprobs: JsonObject = {}
    try:
        ids = decode.prompt_ids(messages, engine.tokenizer, system, plain=False)
        (answer,) = engine.run([Request(tuple(ids), params)], print_piece)
        if answer.error is not None:
            raise answer.error
        reason, tokens = answer.reason, len(answer.ids)
        if wants_logprobs:
            logprobs["logprobs"] = token_logprobs(answer, engine.tokenizer)
    except KeyboardInterrupt:
        tokens = len(pieces)
    except UserError as error:
        print_stderr(f"{error}\n  Type /reset to start again.")
        return None
    print(flush=True)
    if reason in _ENDINGS:
        print_stderr(_ENDINGS[reason].format(tokens=tokens))
    spent = Timing(*(now - then for now, then in zip(astuple(engine.timing), before, strict=True)))
    return {"answer": "".join(pieces), "tokens": tokens, "reason": reason, **logprobs, **speed(spent)}


_ENDINGS = {
    "interrupted": "(stopped)",
    "length": "(cut after {tokens} tokens: --max-new-tokens sets more)",
    "window": "(the model's window is full: /reset starts again)",
}
"""Remarks about answers that did not end by themselves."""


def _switch_adapter(adapters: Adapters, name: str) -> None:
    if name in adapters.names:
        seconds = adapters.switch(name)
        print_stderr(f"adapter: {adapters.active} ({1000 * seconds:.0f} ms)")
    else:
        print_stderr(f"adapter: {adapters.active}", _SWITCH.format(names=", ".join(adapters.names)))


def _read_lines() -> Iterator[str]:
    """Yield the lines of stdin that are not blank. A terminal shows a prompt sign, and lines can be edited."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # Windows has none; its terminal edits lines itself
            import readline  # noqa: F401 - input() uses it: arrow keys, earlier lines, wide characters
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            print_stderr("")
            return
        except UnicodeDecodeError:
            print_stderr("this line is not UTF-8: set the terminal to UTF-8, and type it again")
            continue
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print_stderr("\nType /exit or Ctrl-D to end.")
            continue
        if not is_terminal and not line:
            return
        if line.strip():
            yield line.strip()
