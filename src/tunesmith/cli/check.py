"""``tunesmith check RECIPE [key=value ...]``: everything that can be known before training, and nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result, say


def check(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=2.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Tell all that can be known before training: rows, masks, steps, parameters, precision."""
    from tunesmith.recipe import load

    checked = load(recipe, overrides or ())

    from tunesmith.engine import run

    result(run.check(checked), as_json, lambda found: "\n".join(lines(found)))
    say("This recipe can run.")


def lines(found: Mapping[str, Any]) -> list[str]:
    """What matters of ``engine.run.check``, a line each; ``--json`` has all of it."""
    data, precision = found["data"], found["precision"]
    rows = [("model", found["model"]), ("objective", _keys(found["objective"])), ("adaptation", _keys(found["adaptation"]))]
    for source in data["sources"]:
        rejected = f", {source['rows_rejected']:,} rejected" if source["rows_rejected"] else ""
        rows.append(("source", f"{source['path']}: {source['format']}; {source['rows_kept']:,} rows{rejected}"))
        rows += [("", str(problem)) for problem in source["problems"]]
        rows += [("", f"the template leaves out {place}") for place in source["left_out"]["first"]]
    for split in ("train", "eval"):
        if data[split]:
            rows += [(split, line) for line in _split(data[split])]
    if data["duplicates_train_eval"]:
        rows.append(("", f"{data['duplicates_train_eval']:,} rows are in both train and eval"))
    rows += [
        ("template", data["template"]),
        ("max_length", f"{found['max_length']:,} tokens"),
        ("steps", f"{found['steps']:,}, {found['steps_per_epoch']:,} an epoch; learning rate {found['learning_rate']:g}"),
        (
            "parameters",
            f"{found['trainable_parameters']:,} trained of {found['total_parameters']:,} ({found['trainable_percent']:.2f}%)",
        ),
        ("precision", f"{precision['compute']} ({precision['why']})"),
        ("", f"trained weights {precision['trained_weights']}, frozen weights {precision['frozen_weights']}"),
    ]
    return [f"{name:<11} {text}" for name, text in rows]


def _keys(part: Mapping[str, Any]) -> str:
    """``{"type": "lora", "r": 8}`` -> "lora: r 8"."""
    keys = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in part.items()
        if key != "type" and value not in (None, False)
    )
    return f"{part['type']}: {keys}" if keys else str(part["type"])


def _split(split: Mapping[str, Any]) -> list[str]:
    """The counts of the training or held-out rows, and whatever a person should look at."""
    learnt, lengths, overlong = split["supervised_tokens"], split["histogram"], split["overlong"]
    share = f"{learnt:,} learnt ({learnt / max(1, split['tokens']):.1%})"
    out = [
        f"{split['rows']:,} rows, {split['tokens']:,} tokens, {share}; median {lengths['median']:g}, longest {lengths['max']:,}"
    ]
    if split["unlearnable"]:
        out.append(f"  {split['unlearnable']:,} rows have nothing to learn, the first: {', '.join(split['unlearnable_first'])}")
    if overlong["rows"]:
        out.append(
            f"  {overlong['rows']:,} rows are over max_length ({overlong['policy']}): {overlong['tokens_lost']:,} tokens lost"
        )
    if split["duplicates"]:
        out.append(f"  {split['duplicates']:,} rows repeat another")
    return out
