"""``tunesmith check RECIPE [key=value ...]``: everything that can be known before training, and nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Json, Overrides, RecipeFile
from tunesmith.cli.output import console, result, say
from tunesmith.data.row_problems import shorten
from tunesmith.errors import UserError
from tunesmith.runs.figure_format import duration, size


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take a few real steps: forecast memory and time.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(help="With --measure: GB that the run may use.", show_default="what is free"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Tell all that can be known before training: rows, masks, steps, parameters, precision; with --measure memory and time."""
    from tunesmith.recipe import load

    if memory is not None and (not measure or memory <= 0):
        raise UserError(
            "--memory takes a number of GB above 0 and goes with --measure: tunesmith check --measure --memory 8 ..."
        )
    checked = load(recipe, overrides or ())

    from tunesmith.train import machine, run

    if not measure:
        result(run.check(checked), as_json, lambda found: "\n".join(lines(found)))
        say("This recipe can run. What it will take: tunesmith check --measure")
        return 0
    limit = None if memory is None else int(memory * 1e9)
    with _doing() as doing:
        known = (
            _nothing if as_json else lambda facts: result(facts, False, lambda found: "\n".join(lines(found)))
        )
        found = run.check(
            checked, measure=True, memory_limit_bytes=limit, spent=machine.age(), known=known, say=doing
        )
    result(found, as_json, lambda found: "\n".join(_aligned(_forecast(found["forecast"]))))
    if not found["forecast"]["fits"]:
        say(f"error: {_short_of(found['forecast'])}")
        return UserError.exit_code
    say("This recipe can run.")
    return 0


def _nothing(facts: Mapping[str, Any]) -> None:
    """Under --json there is one object, at the end."""


@contextmanager
def _doing() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: in place on a terminal, as lines elsewhere."""
    screen = console()
    if not screen.is_terminal:
        yield lambda doing: say(f"measuring: {doing}")
        return
    with screen.status("measuring (nothing of it is kept)") as status:
        yield lambda doing: status.update(f"measuring (nothing of it is kept): {doing} ...")


def _short_of(forecast: Mapping[str, Any]) -> str:
    """By how much a run does not fit, and what would."""
    needed, limit = forecast["needed_memory_bytes"], forecast["memory_limit_bytes"]
    short = f"this run needs {size(needed)} and may use {size(limit)}: {size(needed - limit)} are missing."
    return "\n  ".join([short, *forecast["remedies"]])


def lines(found: Mapping[str, Any]) -> list[str]:
    """What matters of ``train.run.check``, a line each; ``--json`` has all of it."""
    data, precision = found["data"], found["precision"]
    rows = [
        ("model", found["model"]),
        ("objective", _keys(found["objective"])),
        ("adaptation", _keys(found["adaptation"])),
    ]
    for source in data["sources"]:
        rejected = f", {source['rows_rejected']:,} rejected" if source["rows_rejected"] else ""
        rows.append(
            ("source", f"{source['path']}: {source['format']}; {source['rows_kept']:,} rows{rejected}")
        )
        rows += [("", str(problem)) for problem in source["problems"]]
        rows += [("", f"the template leaves out {place}") for place in source["left_out"]["first"]]
    for split in ("train", "eval"):
        if data[split]:
            rows += [(split, line) for line in _split(data[split])]
    rows += [("", f"  {name}: {line}") for name, split in data["eval_sets"].items() for line in _split(split)]
    if data["duplicates_train_eval"]:
        rows.append(("", f"{data['duplicates_train_eval']:,} rows are in both train and eval"))
    if data["contaminated"] and data["contaminated"]["rows"]:
        rows += [("", line) for line in _contaminated(data["contaminated"])]
    rows += [
        ("template", data["template"]),
        ("max_length", f"{found['max_length']:,} tokens"),
        (
            "steps",
            f"{found['steps']:,}, {found['steps_per_epoch']:,} an epoch; learning rate {found['learning_rate']:g}",
        ),
        (
            "parameters",
            f"{found['trainable_parameters']:,} trained of {found['total_parameters']:,} ({found['trainable_percent']:.2f}%)",
        ),
        ("precision", f"{precision['compute']} ({precision['why']})"),
        ("", f"trained weights {precision['trained_weights']}, frozen weights {precision['frozen_weights']}"),
        *(("note", line) for line in found["notes"]),
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:<11} {text}" for name, text in rows]


def _forecast(forecast: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run will take, as measured."""
    process = f"{size(forecast['needed_memory_bytes'])} of {size(forecast['memory_limit_bytes'])}"
    time = f"training {duration(forecast['train_seconds'])}"
    if forecast["reference_seconds"]:
        time += f", the reference {duration(forecast['reference_seconds'])}"
    if forecast["evaluations"]:
        time += f", {forecast['evaluations']} evaluations of {duration(forecast['evaluation_seconds'])}"
    return [
        (
            "memory",
            f"{size(forecast['peak_memory_bytes'])} at most, above the program itself; the whole process {process}",
        ),
        (
            "",
            f"micro-batches of at most {forecast['micro_batch_tokens']:,} tokens, the heaviest {forecast['heaviest_tokens']:,}",
        ),
        (
            "speed",
            f"{forecast['seconds_per_step']:.2f} s a step, {forecast['tokens_per_second']:,.0f} tokens/s",
        ),
        (
            "time",
            f"about {duration(forecast['total_seconds'])} to the end: {time}, saving {duration(forecast['saving_seconds'])}",
        ),
    ]


def _contaminated(found: Mapping[str, Any]) -> list[str]:
    """How many evaluation rows share text with training rows, and the first of them."""
    said = f"{found['rows']:,} eval rows ({found['share']:.1%}) share {found['ngram']} tokens or more with a training row"
    said += ":" if found["answers"] is None else f", {found['answers']:,} of them in what is learnt:"
    shown = [
        f"  {one['where']} and {one['same_as']}: {shorten(one['text'], 80)}" for one in found["first"][:3]
    ]
    return [said, *shown, *(["  ... --json lists more"] if found["rows"] > 3 else [])]


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
    by_row = learnt == split["examples"]  # rows are learnt, not tokens
    share = "" if by_row else f", {learnt:,} learnt ({learnt / max(1, split['tokens']):.1%})"
    out = [
        f"{split['rows']:,} rows, {split['tokens']:,} tokens{share}; median {lengths['median']:g}, longest {lengths['max']:,}"
    ]
    if split["unlearnable"]:
        out.append(
            f"  {split['unlearnable']:,} rows have nothing to learn, the first: {', '.join(split['unlearnable_first'])}"
        )
    if overlong["rows"]:
        lost = f"{overlong['tokens_lost']:,} tokens lost"
        if "dropped" in overlong:
            dropped, cut = overlong["dropped"], overlong["rows"] - overlong["dropped"]
            lost = f"{dropped:,} left out whole, the prompts of {cut:,} cut from the left ({lost})"
        out.append(f"  {overlong['rows']:,} rows are over max_length ({overlong['policy']}): {lost}")
    if split["duplicates"]:
        out.append(f"  {split['duplicates']:,} rows repeat another")
    return out
