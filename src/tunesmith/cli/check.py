"""``tunesmith check RECIPE [key=value ...]``: what can be known before training. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from tunesmith.cli import garbage_collection, options
from tunesmith.cli.output import console, print_result, print_stderr
from tunesmith.data.row_problems import shorten
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import duration, size


def check(
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    measure: Annotated[bool, typer.Option("--measure", help="Forecast memory and time.")] = False,
    memory: Annotated[float | None, typer.Option(help="Memory limit in GB.", show_default="free")] = None,
    as_json: options.Json = False,
) -> int:
    """Check a recipe: rows, masks, steps, parameters, precision; with --measure also memory and time."""
    from tunesmith.recipe import load

    if memory is not None and (not measure or memory <= 0):
        raise UserError("--memory needs --measure and GB above 0: tunesmith check --measure --memory 8 ...")
    checked = load(recipe, overrides or (), print_stderr)

    with garbage_collection.imports():
        from tunesmith import machine
        from tunesmith.train import run

    def print_known(facts: JsonObject) -> None:
        if not as_json:  # under --json there is one object, at the end
            print_result(facts, human=lambda facts: "\n".join(lines(facts)))

    if not measure:
        facts = run.check(checked)
        print_result(facts, as_json, lambda facts: "\n".join(lines(facts)))
        print_stderr("This recipe can run. To forecast memory and time: tunesmith check --measure")
        return 0
    limit = None if memory is None else int(memory * 1e9)
    with _show_phase() as show:
        facts = run.check(
            checked, measure=True, memory_limit_bytes=limit, spent=machine.age(), known=print_known, say=show
        )
    print_result(facts, as_json, lambda facts: "\n".join(_align(_forecast_lines(facts["forecast"]))))
    if not facts["forecast"]["fits"]:
        print_stderr(f"error: {_memory_error(facts['forecast'])}")
        return UserError.exit_code
    print_stderr("This recipe can run.")
    return 0


@contextmanager
def _show_phase() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current phase: redrawn on a terminal, as lines elsewhere."""
    screen = console()
    if not screen.is_terminal:
        yield lambda phase: print_stderr(f"measuring: {phase}")
        return
    with screen.status("measuring (no result is kept)") as status:
        yield lambda phase: status.update(f"measuring (no result is kept): {phase} ...")


def _memory_error(forecast: JsonObject) -> str:
    needed, limit = forecast["needed_memory_bytes"], forecast["memory_limit_bytes"]
    short = f"this run needs {size(needed)} and may use {size(limit)}: {size(needed - limit)} are missing."
    return "\n  ".join([short, *forecast["remedies"]])


def lines(facts: JsonObject) -> list[str]:
    """Return the most important facts of ``train.run.check``, a line each; ``--json`` has all of them."""
    from tunesmith.data.encode import turn_findings
    from tunesmith.data.store.data_report import HeldOut

    data, precision = facts["data"], facts["precision"]
    rows = [
        ("model", facts["model"]),
        ("objective", _format_keys(facts["objective"])),
        ("adaptation", _format_keys(facts["adaptation"])),
    ]
    for source in data["sources"]:
        rejected = f", {source['rows_rejected']:,} rejected" if source["rows_rejected"] else ""
        kept = f"{source['rows_kept']:,} rows{rejected}"
        rows.append(("source", f"{source['path']}: {source['format']}; {kept}"))
        rows += [("", str(problem)) for problem in source["problems"]]
        rows += [("", f"the template leaves out {place}") for place in source["left_out"]["first"]]
        rows += [("", line) for line in turn_findings.lines(source["path"], source.get("in_turns", []))]
    if data["held_out"]:
        rows.append(("", HeldOut(**data["held_out"]).line()))
    for name in ("train", "eval"):
        if data[name]:
            rows += [(name, line) for line in _split_lines(data[name])]
    rows += [
        ("", f"  {name}: {line}") for name, split in data["eval_sets"].items() for line in _split_lines(split)
    ]
    if data["duplicates_train_eval"]:
        rows.append(("", f"{data['duplicates_train_eval']:,} rows are in both train and eval"))
    if data["contaminated"] and data["contaminated"]["rows"]:
        rows += [("", line) for line in _contamination_lines(data["contaminated"])]
    trained, total = facts["trainable_parameters"], facts["total_parameters"]
    rows += [
        ("template", data["template"]),
        ("max_length", f"{facts['max_length']:,} tokens"),
        ("steps", f"{facts['steps']:,}, {facts['steps_per_epoch']:,} an epoch; learning rate {facts['learning_rate']:g}"),
        ("parameters", f"{trained:,} trained of {total:,} ({facts['trainable_percent']:.2f}%)"),
        ("precision", f"{precision['compute']} ({precision['why']})"),
        ("", f"trained weights {precision['trained_weights']}, frozen weights {precision['frozen_weights']}"),
        *(("note", line) for line in facts["notes"]),
    ]  # fmt: skip
    return _align(rows)


def _align(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:<11} {text}" for name, text in rows]


def _forecast_lines(forecast: JsonObject) -> list[tuple[str, str]]:
    """Return what the run will need, as measured."""
    keys = ("peak_memory_bytes", "needed_memory_bytes", "memory_limit_bytes")
    peak, needed, limit = (size(forecast[key]) for key in keys)
    budget, heaviest = forecast["micro_batch_tokens"], forecast["heaviest_tokens"]
    step, speed = forecast["seconds_per_step"], forecast["tokens_per_second"]
    seconds = {
        name: duration(forecast[f"{name}_seconds"])
        for name in ("train", "reference", "evaluation", "saving", "total")
    }
    time = f"training {seconds['train']}"
    if forecast["reference_seconds"]:
        time += f", the reference {seconds['reference']}"
    if forecast["evaluations"]:
        time += f", {forecast['evaluations']} evaluations of {seconds['evaluation']}"
    per_iteration = forecast["steps_per_iteration"]
    iteration = (
        f"{step * per_iteration:.1f} s an iteration of {per_iteration} steps, " if per_iteration > 1 else ""
    )
    return [
        ("memory", f"{peak} at most, above the program itself; the whole process {needed} of {limit}"),
        ("", f"micro-batches of at most {budget:,} tokens, the heaviest {heaviest:,}"),
        ("speed", f"{iteration}{step:.2f} s a step, {speed:,.0f} tokens/s"),
        ("time", f"about {seconds['total']} to the end: {time}, saving {seconds['saving']}"),
    ]  # fmt: skip


def _contamination_lines(facts: JsonObject) -> list[str]:
    """Return how many evaluation rows share text with training rows, and the first three of them."""
    from tunesmith.data.check.contamination import passage

    head = f"{facts['rows']:,} eval rows ({facts['share']:.1%}) share {passage(facts['letters'])} with a training row"
    head += ":" if facts["answers"] is None else f", {facts['answers']:,} of them in supervised tokens:"
    rows = facts["first"][:3]
    first = [f"  {row['where']} and {row['same_as']}: {shorten(row['text'], 80)}" for row in rows]
    return [head, *first, *(["  ... --json lists more"] if facts["rows"] > 3 else [])]


def _format_keys(part: JsonObject) -> str:
    """``{"type": "lora", "r": 8}`` -> "lora: r 8"."""
    keys = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in part.items()
        if key != "type" and value not in (None, False)
    )
    return f"{part['type']}: {keys}" if keys else str(part["type"])


def _split_lines(split: JsonObject) -> list[str]:
    """Return the counts of the training or evaluation set, and what to look at in it."""
    supervised, lengths, overlong = split["supervised_tokens"], split["histogram"], split["overlong"]
    has_row_labels = supervised == split["examples"]  # one label for each row, none for tokens
    percent = f"{supervised / max(1, split['tokens']):.1%}"
    share = "" if has_row_labels else f", {supervised:,} supervised ({percent})"
    out = [
        f"{split['rows']:,} rows, {split['tokens']:,} tokens{share}; median {lengths['median']:g}, longest {lengths['max']:,}"
    ]
    if split["unlearnable"]:
        first = ", ".join(split["unlearnable_first"])
        out.append(f"  {split['unlearnable']:,} rows have no supervised tokens, the first: {first}")
    if overlong["rows"]:
        lost = f"{overlong['tokens_lost']:,} tokens lost"
        if "dropped" in overlong:
            dropped, cut = overlong["dropped"], overlong["rows"] - overlong["dropped"]
            lost = f"{dropped:,} left out whole, the prompts of {cut:,} cut from the left ({lost})"
        out.append(f"  {overlong['rows']:,} rows are over max_length ({overlong['policy']}): {lost}")
    if split["duplicates"]:
        out.append(f"  {split['duplicates']:,} rows repeat another")
    return out
