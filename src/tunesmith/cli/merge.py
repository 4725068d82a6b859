"""``tunesmith merge MODEL --out DIR``: a LoRA folded into its base."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.output import result, say


def merge(
    model: Annotated[str, typer.Argument(help="adapter folder or run folder")],
    out: Annotated[str, typer.Option(help="new folder for the merged model")],
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fold a LoRA into its base; the result is a plain transformers folder, checked against the adapter."""
    from tunesmith.merge.merge_adapter import merge as fold

    say(f"merging {model} into its base")
    facts = fold(model, out, dtype=dtype)
    if facts["max_logit_difference_saved"] > 10 * max(facts["max_logit_difference"], 1e-3):
        say(
            f"Rounding to {facts['dtype']} moved a logit by {facts['max_logit_difference_saved']:.2g} and the distribution of "
            f"a token by {facts['max_kl_saved']:.2g} nats: small updates are lost in it. --dtype float32 keeps the "
            "adapter's answers, in a larger folder."
        )
    result(facts, as_json)
