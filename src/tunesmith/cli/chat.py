"""``tunesmith chat MODEL``: chat with a model; answers stream, the conversation is kept."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from tunesmith.models.adapters.adapter_set import Adapters

_HELP = "Commands: /reset clears the conversation, /system TEXT also sets the system message, /exit ends."
_SWITCH = "/adapter NAME switches to another adapter and keeps the conversation; there are {names}."


def chat(
    model: options.Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="An adapter to switch to; may be repeated."),
    ] = None,
    system: options.System = None,
    template_kwarg: options.TemplateKwargs = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = 0,
    precision: options.Precision = "auto",
    seed: Annotated[int, typer.Option(help="Same seed and same turns, same answers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the conversation as JSON.")] = False,
) -> None:
    """Chat with a model. Reads lines from the terminal or from a pipe."""
    from tunesmith.data.encode.templates import apply_template
    from tunesmith.models.adapters.adapter_set import load_adapters
    from tunesmith.models.generate import decode
    from tunesmith.models.generate.engine import Engine
    from tunesmith.models.generate.sampling import SamplingParams
    from tunesmith.models.load.compute_dtype import cast_and_move
    from tunesmith.models.load.load import load

    kwargs = options.parse_template_kwargs(template_kwarg)
    folders = _with_adapter_of_model(model, _parse_adapters(adapter or []))
    settings: JsonObject = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings["top_k"] = top_k
    SamplingParams(**settings, seed=seed)  # reports a wrong setting before the model is loaded
    print_stderr(f"loading {model}")
    adapters = load_adapters(model, folders) if folders else None
    pair = load(model) if adapters is None else (adapters.model, adapters.tokenizer)
    decode.check_writes(pair[0])
    chosen_dtype = cast_and_move(pair[0], precision)
    print_stderr(str(chosen_dtype))
    if not pair[1].chat_template:
        raise UserError(f"{model} has no chat template. Use `tunesmith generate {model} --prompt ...`.")
    for tokenizer in [pair[1]] if adapters is None else adapters.tokenizers.values():
        if kwargs and tokenizer.chat_template:
            apply_template(tokenizer, None, kwargs)
    print_stderr(_HELP)
    if adapters is not None:
        print_stderr(_SWITCH.format(names=", ".join(adapters.names)), f"adapter: {adapters.active}")
    engine = Engine(*pair)
    turns: list[dict[str, str]] = []
    for line in _read_lines():
        command, _, rest = line.partition(" ")
        argument = rest.strip()
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            system = argument or None if command == "/system" else system
            turns = []
            print_stderr("cleared" if command == "/reset" else f"system message: {system or 'none'}")
        elif command == "/adapter" and adapters is not None:
            _switch_adapter(adapters, argument)
            engine = Engine(adapters.model, adapters.tokenizer)
        elif line.startswith("/"):
            print_stderr(_HELP)
        else:
            messages = [*turns, {"role": "user", "content": line}]
            pieces = decode.stream(engine, messages, system=system, **settings, seed=seed + len(turns))
            answer = _print_answer(pieces)
            if answer is not None:
                turns = [*messages, {"role": "assistant", "content": answer}]
    if as_json:
        first = [{"role": "system", "content": system}] if system else []
        active = None if adapters is None else adapters.active
        facts = {"model": model, "adapter": active, "precision": chosen_dtype.as_dict()}
        print_result({**facts, "messages": first + turns}, as_json=True)


def _print_answer(pieces: Iterator[str]) -> str | None:
    """Print an answer as it comes and return it; None if the conversation exceeds the window."""
    answer = ""
    try:
        for piece in pieces:  # under --json sys.stdout is stderr, so that stdout carries the result alone
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        print_stderr("  (stopped)")
    except UserError as error:
        print_stderr(f"{error}\n  Type /reset to start again.")
        return None
    print(flush=True)
    return answer


def _switch_adapter(adapters: Adapters, name: str) -> None:
    if name in adapters.names:
        seconds = adapters.switch(name)
        print_stderr(f"adapter: {adapters.active} ({1000 * seconds:.0f} ms)")
    else:
        print_stderr(f"adapter: {adapters.active}", _SWITCH.format(names=", ".join(adapters.names)))


def _parse_adapters(given: list[str]) -> dict[str, str]:
    """Parse ``NAME=FOLDER`` options into name -> folder. Raises UserError."""
    folders: dict[str, str] = {}
    for option in given:
        name, equals, folder = option.partition("=")
        if not (name.isidentifier() and equals and folder) or name in (*folders, "base"):
            raise UserError(
                f"--adapter {option}: expected NAME=FOLDER; a name has letters and digits, is used once, and is not `base`"
            )
        folders[name] = folder
    return folders


def _with_adapter_of_model(model: str, folders: dict[str, str]) -> dict[str, str]:
    """Add MODEL itself, under its folder's name, if it is an adapter and there are others to switch to."""
    from tunesmith.models.find.locate import locate

    if not folders:
        return folders
    located = locate(model)
    if located.kind != "adapter":
        return folders
    name = re.sub(r"\W", "_", (located.run or located.path).name)
    while name in (*folders, "base"):
        name += "_"
    return {name: model, **folders}


def _read_lines() -> Iterator[str]:
    """Yield the lines of stdin that are not blank; show a prompt sign on a terminal."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
