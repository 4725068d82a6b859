"""``tunesmith train RECIPE [key=value ...]``: train a model from a recipe and print the result."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli import garbage_collection, options
from tunesmith.cli.output import console, filled_columns, print_result, print_stderr
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import change_text, number, size

_MOST_SAMPLE = 300
"""Characters of a sample in the table; the report has all of it."""


def train(
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    out: options.Out = None,
    resume: options.Resume = False,
    restart: options.Restart = False,
    deepspeed: options.DeepSpeed = None,
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Train a model from a recipe."""
    from tunesmith.recipe import brief, load
    from tunesmith.runs import run_folder

    checked = load(recipe, overrides or (), print_stderr)
    folder = out or Path("runs") / recipe.stem
    alone = (
        int(os.environ.get("WORLD_SIZE", "1")) == 1
    )  # with several processes, run.train locks the folder in the main process
    # lock the folder before the import of torch, which takes seconds
    claimed = run_folder.claim(folder, run_folder.start_of(resume, restart)) if alone else None
    try:
        print_stderr(brief(checked))

        with garbage_collection.imports():
            from tunesmith import machine
            from tunesmith.train import run

        outcome = run.train(
            checked,
            out=claimed or folder,
            resume=resume,
            restart=restart,
            deepspeed=deepspeed,
            console=console(),
            spent=machine.age(),
        )
    finally:
        if claimed is not None:
            claimed.close()
    if outcome:  # empty in every process but the main one
        print_result(outcome, as_json, summary)


def summary(outcome: JsonObject) -> list[RenderableType]:
    """Return tables of figures and samples before and after, then the paths, then the next command."""
    trained, total = outcome["trainable_parameters"], outcome["total_parameters"]
    lines = [
        f"stopped    {outcome['stopped']}" if outcome.get("stopped") else "",
        *(f"verdict    {line}" for line in _verdicts(outcome)),
        _answers_line(outcome.get("samples") or []),
        f"steps      {outcome['steps']}, {outcome['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {size(outcome['peak_memory_bytes'])}",
        f"trained    {trained:,} of {total:,} parameters ({trained / total:.2%})",
        f"model      {outcome['model_dir']}",
        f"merged     {outcome['merged_dir']}" if outcome.get("merged_dir") else "",
        f"report     {outcome['report']}",
        *_next_commands(outcome),
    ]
    tables: list[RenderableType] = [_figures(outcome)] if outcome.get("eval_loss") is not None else []
    if outcome.get("samples"):
        tables.append(_samples(outcome["samples"]))
    return [*tables, "\n".join(filter(None, lines))]


def _verdicts(outcome: JsonObject) -> list[str]:
    overfit = [outcome["verdict"]["text"]] if outcome.get("verdict") else []
    return [*(outcome.get("assessment") or {}).get("verdict", ()), *overfit]


def _answers_line(samples: list[JsonObject]) -> str:
    """Return a line on whether the sample answers came nearer to their references; "" without references."""
    from tunesmith.metrics import squad

    pairs = [
        [squad.f1(str(sample[side]), [sample["reference"]]) for side in ("before", "after")]
        for sample in samples
        if sample.get("reference") and sample.get("after") is not None
    ]
    if not pairs:
        return ""
    nearer = sum(after > before for before, after in pairs)
    before, after = (sum(side) / len(pairs) for side in zip(*pairs))
    better = after > before and 2 * nearer > len(pairs)
    means = f"mean F1 of the words in common: {before:.2f} before, {after:.2f} after"
    counts = f"{nearer} of {len(pairs)} are nearer to the reference ({means})"
    return f"answers    {'better' if better else 'not better'} than before: {counts}"


def _next_commands(outcome: JsonObject) -> list[str]:
    model = shlex.quote(str(outcome["model_dir"]))
    if outcome.get("writes", True):
        return [f'next       tunesmith generate {model} --prompt "..."', f"           tunesmith chat {model}"]
    from tunesmith import objectives

    verb = "score" if objectives.module(outcome["objective"]).Objective.traits.rewards else "predict"
    return [
        f"next       tunesmith evaluate {model} --data FILE",
        f"           tunesmith {verb} {model} --data FILE --out FILE",
    ]


def _figures(outcome: JsonObject) -> Table:
    """Held-out figures before and after: a row for each figure, or for each evaluation set and all of them."""
    sets = outcome.get("eval_sets", ())
    labels = {key: key.removeprefix("eval_").replace("_", " ") for key in outcome["figures"]}
    if not sets:
        assessed = (outcome.get("assessment") or {}).get("figures") or {}
        rows = [
            [label, *_before_and_after(outcome, [key]), *change_and_baseline(assessed.get(key) or {})]
            for key, label in labels.items()
        ]
        heads = ("held-out rows", "before", "after", "change (95% interval)", "baseline")
        return filled_columns(heads, rows, "Result")
    keys = list(labels)[:2]  # a terminal has room for two figures next to the names of the sets
    of_sets = [head for key in keys for head in (f"{labels[key]} before", "after")]
    table = Table("held-out rows", *of_sets, title="Result", title_justify="left")
    for name in sets:
        keys_of_set = [f"eval_{name}_{key.removeprefix('eval_')}" for key in keys]
        table.add_row(name, *_before_and_after(outcome, keys_of_set))
    table.add_row("all together", *_before_and_after(outcome, keys))
    return table


def change_and_baseline(figure: JsonObject) -> list[str]:
    """Return the cells next to an assessed figure: ``+0.329 (+0.25 to +0.41)`` and ``0.55, always bad``."""
    change, baseline = figure.get("change"), figure.get("baseline")
    return [
        change_text(change) if change else "",
        f"{number(baseline['value'])}, {baseline['words']}" if baseline else "",
    ]


def _before_and_after(outcome: JsonObject, keys: list[str]) -> list[str]:
    cells = []
    for key in keys:
        digits = 2 if key.endswith("perplexity") else 4
        values = outcome.get(f"{key}_before"), outcome.get(key)
        cells += ["-" if value is None else f"{value:.{digits}f}" for value in values]
    return cells


def _samples(samples: list[JsonObject]) -> Table:
    """A block for each prompt: prompt, answers before and after, and the held-out answer."""
    table = Table("", "", title="Samples", title_justify="left", show_header=False)
    for sample in samples:
        for name in ("prompt", "before", "after", "reference"):
            if sample[name] is not None:
                text = str(sample[name]).strip()
                short = text if len(text) <= _MOST_SAMPLE else text[: _MOST_SAMPLE - 1] + "…"
                if cut := sample.get(f"{name}_cut"):
                    short += f" [cut at {cut} tokens]"
                table.add_row(name, Text(short, overflow="fold"))
        table.add_section()
    return table
