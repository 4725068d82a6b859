"""``tunesmith merge MODEL --out DIR``: a LoRA folded into its base."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.output import result, say


def merge(
    model: Annotated[str, typer.Argument(help="adapter folder or run folder")],
    out: Annotated[str, typer.Option(help="new folder for the merged model")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fold a LoRA into its base; the result is a plain transformers folder, checked against the adapter."""
    from tunesmith.merge.run import merge as fold

    say(f"merging {model} into its base")
    result(fold(model, out), as_json)
