"""``tunesmith chat MODEL``: talk with a model; answers stream, the history is kept."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result, say
from tunesmith.errors import UserError

_HELP = (
    "Commands: /reset forgets the conversation, /system TEXT sets the system message and forgets, /exit ends."
)
_SWITCH = "/adapter NAME takes another adapter, the conversation stays; there are {names}."


def chat(
    model: Annotated[
        str, typer.Argument(help="Catalog name, model, adapter or run folder.", show_default=False)
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="An adapter to switch to; may be repeated.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with this share together.")
    ] = 0.9,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(help="Same seed and same turns, same answers.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the conversation as one JSON object at the end.")
    ] = False,
) -> None:
    """Talk with a model. Reads lines from the terminal or from a pipe."""
    from tunesmith.models.adapters.adapter_set import load_adapters
    from tunesmith.models.generate import decode as engine
    from tunesmith.models.load.load import load

    named = _with_own(model, _named(adapter or []))
    chosen: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    engine.Settings(**chosen, seed=seed)  # a wrong setting is told before the model is loaded
    say(f"loading {model}")
    several = load_adapters(model, named) if named else None
    pair = load(model) if several is None else (several.model, several.tokenizer)
    engine.check_writes(pair[0])
    if not pair[1].chat_template:
        raise UserError(
            f"{model} has no chat template, so it knows no turns. Use `tunesmith generate {model} --prompt ...`."
        )
    say(_HELP)
    if several is not None:
        say(_SWITCH.format(names=", ".join(several.names)), f"adapter: {several.active}")
    turns: list[dict[str, str]] = []
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            system = rest.strip() or None if command == "/system" else system
            turns = []
            say("forgotten" if command == "/reset" else f"system message: {system or 'none'}")
        elif command == "/adapter" and several is not None:
            if rest.strip() in several.names:
                seconds = several.switch(rest.strip())
                pair = (several.model, several.tokenizer)
                say(f"adapter: {several.active} ({1000 * seconds:.0f} ms)")
            else:
                say(f"adapter: {several.active}", _SWITCH.format(names=", ".join(several.names)))
        elif line.startswith("/"):
            say(_HELP)
        else:
            asked = [*turns, {"role": "user", "content": line}]
            answer = ""
            try:
                # under --json sys.stdout is stderr, so that stdout carries the result alone
                for piece in engine.stream(pair, asked, system=system, **chosen, seed=seed + len(turns)):
                    print(piece, end="", flush=True)
                    answer += piece
            except KeyboardInterrupt:
                say("  (stopped)")
            except UserError as error:  # the conversation has filled the window
                say(f"{error}\n  Type /reset to begin anew.")
                continue
            print(flush=True)
            turns = [*asked, {"role": "assistant", "content": answer}]
    if as_json:
        head = [{"role": "system", "content": system}] if system else []
        active = None if several is None else several.active
        result({"model": model, "adapter": active, "messages": head + turns}, as_json=True)


def _named(given: list[str]) -> dict[str, str]:
    """``NAME=FOLDER`` -> name and folder. Raises UserError."""
    named: dict[str, str] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not (name.isidentifier() and equals and folder) or name in (*named, "base"):
            raise UserError(
                f"--adapter {one}: expected NAME=FOLDER, each name once, of letters and digits, and none called base"
            )
        named[name] = folder
    return named


def _with_own(model: str, named: dict[str, str]) -> dict[str, str]:
    """With the adapter that MODEL itself is, first and under its folder's name, where there are others to switch to."""
    from tunesmith.models.find.locate import locate

    if not named:
        return named
    folder = locate(model)
    if folder.kind != "adapter":
        return named
    name = re.sub(r"\W", "_", (folder.run or folder.path).name)
    while name in (*named, "base"):
        name += "_"
    return {name: model, **named}


def _lines() -> Iterator[str]:
    """Lines that are not blank, until the end of the input. A person gets a prompt sign; a pipe does not."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
