"""``tunesmith merge MODEL --out DIR``: merge a LoRA into its base."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr


def merge(
    model: Annotated[str, typer.Argument(help="Adapter folder or run folder.")],
    out: Annotated[str, typer.Option(help="New folder for the merged model.")],
    dtype: Annotated[
        str, typer.Option(help="auto (the base's; with a task head float32), float32, bfloat16, float16.")
    ] = "auto",
    as_json: options.Json = False,
) -> None:
    """Merge a LoRA into its base: a plain transformers folder, checked against the adapter's logits."""
    from tunesmith.merge.merge_adapter import merge as merge_adapter

    print_stderr(f"merging {model} into its base")
    facts = merge_adapter(model, out, dtype=dtype)
    if facts["max_logit_difference_saved"] > 10 * max(facts["max_logit_difference"], 1e-3):
        print_stderr(
            f"Rounding to {facts['dtype']} changed a logit by {facts['max_logit_difference_saved']:.2g} and a token's "
            f"distribution by {facts['max_kl_saved']:.2g} nats, so small updates are lost. --dtype float32 keeps the "
            "adapter's answers, in a larger folder."
        )
    print_result(facts, as_json)
