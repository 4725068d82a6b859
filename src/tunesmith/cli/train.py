"""``tunesmith train RECIPE [key=value ...]``: run a recipe and print what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tunesmith.cli.options import DeepSpeed, Json, Out, Overrides, RecipeFile, Resume
from tunesmith.cli.output import console, result, say
from tunesmith.runs.figure_format import size


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    deepspeed: DeepSpeed = None,
    as_json: Json = False,
) -> None:
    """Train a model as a recipe says."""
    from tunesmith.recipe import brief, load

    checked = load(recipe, overrides or ())
    say(brief(checked))

    from tunesmith.train import run

    target = out or Path("runs") / recipe.stem
    outcome = run.train(checked, out=target, resume=resume, deepspeed=deepspeed, console=console())
    if outcome:  # of several processes the main one tells
        result(outcome, as_json, summary)


def summary(outcome: Mapping[str, Any]) -> list[Any]:
    """Tables of the figures and the samples before and after, where everything is, and the next command."""
    name = shlex.quote(str(outcome["model_dir"]))
    lines = [
        f"stopped    {outcome['stopped']}" if outcome.get("stopped") else "",
        f"verdict    {outcome['verdict']['text']}" if outcome.get("verdict") else "",
        f"steps      {outcome['steps']}, {outcome['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {size(outcome['peak_memory_bytes'])}",
        f"trained    {outcome['trainable_parameters']:,} of {outcome['total_parameters']:,} parameters "
        f"({outcome['trainable_parameters'] / outcome['total_parameters']:.2%})",
        f"model      {outcome['model_dir']}",
        f"merged     {outcome['merged_dir']}" if outcome.get("merged_dir") else "",
        f"report     {outcome['report']}",
        *_next(outcome, name),
    ]
    tables = [_figures(outcome)] if outcome.get("eval_loss") is not None else []
    if outcome.get("samples"):
        tables.append(_samples(outcome["samples"]))
    return [*tables, "\n".join(filter(None, lines))]


def _next(outcome: Mapping[str, Any], name: str) -> list[str]:
    """What to type now: models that write are talked to, others judge somebody's rows."""
    if outcome.get("writes", True):
        return [f'next       tunesmith generate {name} --prompt "..."', f"           tunesmith chat {name}"]
    from tunesmith import objectives

    verb = "score" if objectives.module(outcome["objective"]).Objective.traits.rewards else "predict"
    return [
        f"next       tunesmith evaluate {name} --data FILE",
        f"           tunesmith {verb} {name} --data FILE --out FILE",
    ]


def _figures(outcome: Mapping[str, Any]) -> Table:
    """Held-out figures before and after; one line for each evaluation set, then one for all rows together."""
    sets, names = outcome.get("eval_sets", ()), outcome["figures"]
    shown = [(name.removeprefix("eval_").replace("_", " "), name) for name in names]
    if not sets:
        table = Table("held-out rows", "before", "after", title="Result", title_justify="left")
        for name, key in shown:
            table.add_row(name, *_before_and_after(outcome, key))
        return table
    shown = shown[:2]  # what fits beside the names of sets
    heads = [head for name, _ in shown for head in (f"{name} before", "after")]
    table = Table("held-out rows", *heads, title="Result", title_justify="left")
    for one in sets:
        keys = [f"eval_{one}_{key.removeprefix('eval_')}" for _, key in shown]
        table.add_row(one, *(cell for key in keys for cell in _before_and_after(outcome, key)))
    table.add_row("all together", *(cell for _, key in shown for cell in _before_and_after(outcome, key)))
    return table


def _before_and_after(outcome: Mapping[str, Any], key: str) -> list[str]:
    values, digits = (outcome.get(f"{key}_before"), outcome.get(key)), 2 if key.endswith("perplexity") else 4
    return ["-" if value is None else f"{value:.{digits}f}" for value in values]


def _samples(samples: list[Mapping[str, str | None]]) -> Table:
    """One block for each prompt: asked, answered before, answered after, and what the held-out row says."""
    table = Table("", "", title="Samples", title_justify="left", show_header=False)
    for sample in samples:
        for name in ("prompt", "before", "after", "reference"):
            if sample[name] is not None:
                table.add_row(name, Text(_shortened(str(sample[name]).strip()), overflow="fold"))
        table.add_section()
    return table


def _shortened(text: str, characters: int = 300) -> str:
    """One sample's cell; the report holds the whole."""
    return text if len(text) <= characters else text[: characters - 1] + "…"
