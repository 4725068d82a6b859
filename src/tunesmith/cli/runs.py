"""``tunesmith runs list | show | compare | reproduce``: results of runs, side by side, one repeated."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from tunesmith import files
from tunesmith.cli import options
from tunesmith.cli.output import columns, console, print_result, print_stderr
from tunesmith.errors import NotReproduced, UserError
from tunesmith.json_types import JsonObject
from tunesmith.runs import figure_format
from tunesmith.runs.figure_format import change_text, is_number, label, lower_is_better, size

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show, compare and repeat runs.")

_UNFINISHED = ("killed", "stopped")
_LEAST_IMPORTANT = ("memory", "started", "model", "tokens/s")
"""Columns of the list that a narrow terminal loses, in this order."""


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: options.Json = False,
) -> None:
    """List the runs in a folder, oldest first: state, objective, loss before and after, speed, memory."""
    from tunesmith.runs import run_list

    print_result({"runs": [run.facts() for run in run_list.find(folder)]}, as_json, _list_table)


@app.command("show")
def show(run: options.RunFolder, as_json: options.Json = False) -> None:
    """Show everything that a run folder records: recipe, data, machine, result."""
    from tunesmith.runs import run_list

    stored = run_list.read(run)
    facts = {**stored.facts(), "recipe": stored.recipe, "manifest": stored.manifest}
    print_result(facts, as_json, _show_lines)


@app.command("report")
def report(run: options.RunFolder, language: options.Language = None, as_json: options.Json = False) -> None:
    """Write the report of a run again from the files of its folder, such as in another language."""
    from tunesmith.report import run_page

    if not (run / "manifest.json").exists():
        raise UserError(f"{run} is no run folder: it has no manifest.json. Type: tunesmith runs list")
    path = run_page.write_report(run)
    print_result({"report": str(path)}, as_json, lambda result: f"report: {result['report']}")


@app.command("compare")
def compare_runs(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    out: Annotated[Path, typer.Option(help="Write the curves to this PNG.")] = Path("compare.png"),
    by: Annotated[str, typer.Option(help="x axis of the curves: step or tokens.")] = "step",
    as_json: options.Json = False,
) -> None:
    """Compare runs: overlaid curves, recipe keys that differ, and results side by side."""
    from tunesmith.report import charts
    from tunesmith.runs import assessment, compare, run_list

    if len(folders) < 2 or by not in ("step", "tokens"):
        raise UserError(
            "compare needs two runs and --by step or tokens: tunesmith runs compare runs/a runs/b"
        )
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png, since the curves are a PNG")
    runs = [run_list.read(folder) for folder in folders]
    facts = {
        "runs": [run.facts() for run in runs],
        "differences": compare.differences(runs),
        "cautions": (cautions := compare.cautions(runs)),
        "changes": [{} if cautions else assessment.differences(runs[0].path, run.path) for run in runs[1:]],
        "picture": str(out),
    }
    try:
        files.replace_file(out, charts.png(charts.compare(compare.losses(runs, by), by)))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Name another file with --out") from None
    print_result(facts, as_json, lambda facts: _comparison(facts, compare.names(runs)))


@app.command("reproduce")
def reproduce(
    run: options.RunFolder,
    out: Annotated[Path | None, typer.Option(help="New run folder.", show_default="RUN-again")] = None,
    as_json: options.Json = False,
) -> int:
    """Train a finished run again and report whether records and weights are the same, bit for bit."""
    from tunesmith.train.reproduce import reproduce as repeat

    facts = repeat(run, out, console())
    print_result(facts, as_json, _repetition)
    if not facts["equal"]:
        print_stderr(f"error: {facts['again']} differs from {facts['run']}. Both are kept.")
        return NotReproduced.exit_code
    print_stderr("The same, bit for bit.")
    return 0


def _list_table(facts: JsonObject) -> RenderableType | list[RenderableType]:
    if not facts["runs"]:
        return "no runs"
    rows = [_list_row(run) for run in facts["runs"]]
    heads = [head for head in rows[0] if head != "figure" or any(row[head] != "-" for row in rows)]
    for head in _LEAST_IMPORTANT:  # until each run fits on one line
        widths = [max(len(head), *(len(row[head]) for row in rows)) + 2 for head in heads]
        if sum(widths) - 2 <= columns():
            break
        heads.remove(head)
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    return [table, *(f"unreadable: {run['problem']}" for run in facts["runs"] if run["problem"])]


def _list_row(run: JsonObject) -> dict[str, str]:
    """Return heading -> cell."""
    is_unfinished = run["planned_steps"] and run["state"] != "done"
    steps = f"{run['step']}/{run['planned_steps']}" if is_unfinished else str(run["step"])
    figures = {name: both for name, both in run["figures"].items() if lower_is_better(name) is False}
    return {
        "run": Path(run["run"]).name,
        "state": run["state"],
        "what": _join(run["objective"], run["adaptation"]),
        "model": Path(str(run["model"] or "-")).name,
        "steps": "-" if run["state"] == "unreadable" else steps,
        "loss": f"{_figure(run['eval_loss_before'], 3)} -> {_figure(run['eval_loss'], 3)}",
        "figure": next((_change(name, *both) for name, both in figures.items()), "-"),
        "tokens/s": _figure(run["tokens_per_second"], 0),
        "memory": _memory(run) or "-",
        "started": str(run["created"] or "")[5:16].replace("T", " ") or "-",
    }


def _show_lines(facts: JsonObject) -> str:
    manifest = facts["manifest"]
    result, data, machine = (manifest.get(key) or {} for key in ("result", "data", "machine"))
    setup = _join(facts["objective"], facts["adaptation"] and f"with {facts['adaptation']}")
    command = figure_format.short_command(manifest.get("command") or "")
    losses = (
        _with_value("{} before", _figure(facts["eval_loss_before"], unknown="")),
        # Without a result the figures come from the records so far.
        _with_value("{} after" if result else "{} at best so far", _figure(facts["eval_loss"], unknown="")),
    )
    counts = manifest.get("parameters") or {}
    trained = f"{counts.get('trainable', 0):,} trained of {counts.get('total', 0):,}" if counts else ""
    seconds = result.get("train_seconds")
    speed = _with_value("{} tokens/s", _figure(facts["tokens_per_second"], 0, unknown=""))
    threads, torch = machine.get("threads"), (machine.get("versions") or {}).get("torch")
    hardware = (machine.get("cpu"), _with_value("{} threads", threads), _with_value("torch {}", torch))
    lines = [
        ("run", facts["run"]),
        ("state", _state(facts)),
        ("", str(facts["stopped"] or "")),
        ("started", "  ".join(filter(None, (facts["created"], command)))),
        ("model", f"{facts['model']}  {setup}{_with_value(', seed {}', manifest.get('seed'))}"),
        ("parameters", trained),
        *(
            ("data", f"{source['path']}  {source['rows_kept']:,} rows  sha256 {source['sha256'][:12]}")
            for source in data.get("sources", ())
        ),
        *(("verdict", line) for line in (result.get("assessment") or {}).get("verdict", ())),
        ("loss", ", ".join(filter(None, losses)) + _with_value(" (step {})", facts["best_step"])),
        ("figures", ", ".join(_change(name, *both) for name, both in facts["figures"].items())),
        ("speed", speed + (f", {figure_format.duration(seconds)}" if seconds else "")),
        ("memory", _memory(facts)),
        ("machine", ", ".join(map(str, filter(None, hardware)))),
        *(("note", note) for note in manifest.get("notes") or ()),
        ("next", _next_command(facts)),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in lines if text)


def _state(facts: JsonObject) -> str:
    planned = f" of {facts['planned_steps']}" if facts["planned_steps"] else ""
    state = f"{facts['state']}, step {facts['step']}{planned}"
    if facts["state"] not in _UNFINISHED:
        return state
    saved = facts["checkpoint"]
    return f"{state}, " + ("no checkpoint" if saved is None else f"last checkpoint at step {saved}")


def _next_command(facts: JsonObject) -> str:
    """Return the command that repeats a run, or resumes it with its processes and DeepSpeed configuration."""
    run, manifest = facts["run"], facts["manifest"]
    if facts["state"] == "done":
        return f"tunesmith runs reproduce {shlex.quote(run)}"
    if facts["state"] not in _UNFINISHED:
        return ""
    processes = manifest.get("processes") or 1
    verb = f"launch --processes {processes}" if processes > 1 else "train"
    given = re.search(r"--deepspeed[ =](\S+)", str(manifest.get("command")))
    sharded = f" --deepspeed {given.group(1) if given else 'FILE.json'}" if manifest.get("deepspeed") else ""
    return f"tunesmith {verb} {shlex.quote(f'{run}/recipe.yaml')} --out {shlex.quote(run)}{sharded} --resume"


def _comparison(facts: JsonObject, names: list[str]) -> list[RenderableType]:
    from tunesmith.runs.compare import shorten_paths

    runs, differences = facts["runs"], facts["differences"]
    table = Table(title="Recipes: what differs; results", title_justify="left")
    # The key column keeps its width: two keys may look alike when cut.
    widest = max(map(len, [*differences, "tokens_per_second"]))
    table.add_column("", overflow="fold", min_width=min(36, widest))
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in differences.items():
        table.add_row(key, *map(str, shorten_paths(values)))
    table.add_section()

    def add(key: str, values: Iterable[object]) -> None:
        cells = (figure_format.number(one) if is_number(one) else str(one or "-") for one in values)
        table.add_row(key, *cells)

    def add_key(key: str) -> None:
        add(key, (run[key] for run in runs))

    for key in ("processes", "sharded"):
        cells = [str(run[key]) for run in runs]
        if len(set(cells)) > 1:
            table.add_row(key, *cells)
    for key in ("state", "eval_loss_before", "eval_loss"):
        add_key(key)
    if any(run["perplexity"] for run in runs):
        add_key("perplexity")
    for name in dict.fromkeys(name for run in runs for name in run["figures"]):
        for index, key in enumerate((f"{name}_before", name)):
            add(key, (run["figures"].get(name, (None, None))[index] for run in runs))
    for key in ("best_step", "tokens_per_second", "tokens"):
        add_key(key)
    add("peak_memory", (_memory(run) for run in runs))
    return [table, *_changes(facts, names), *facts["cautions"], f"curves      {facts['picture']}"]


def _changes(facts: JsonObject, names: list[str]) -> list[str]:
    """Return lines such as ``b against a: eval_loss -0.1 (-0.15 to -0.04), better``, over the same rows."""
    words = {True: "better", False: "worse", None: "may be chance"}
    lines = []
    for name, changes in zip(names[1:], facts["changes"]):
        parts = [
            f"{label(figure)} {change_text(change)}, {words[change['better']]}"
            for figure, change in changes.items()
            if lower_is_better(figure) is not None
        ]
        lines += [f"{name} against {names[0]}: {'; '.join(parts)}"] if parts else []
    return lines


def _repetition(facts: JsonObject) -> str:
    def pair(record: JsonObject) -> str:
        return f"at step {record['step']}: {record['figure']} was {record['before']}, is {record['now']}"

    lines = [f"run         {facts['run']}", f"again       {facts['again']}"]
    lines += [f"other now   {key}: was {old}, is {new}" for key, (old, new) in facts["machine"].items()]
    if facts["difference"]:
        lines.append(f"records     first difference {pair(facts['difference'])}")
        lines += [f"            largest difference {pair(facts['furthest'])}"] if facts["furthest"] else []
    else:
        lines.append(f"records     all {facts['records']} are the same")
    lines.append(f"weights     {'the same' if facts['weights_equal'] else 'not the same'}")
    return "\n".join(lines)


def _change(name: str, before: object, after: object) -> str:
    """``accuracy 0.512 -> 0.841``."""
    return f"{name.removeprefix('eval_')} {_figure(before, 3)} -> {_figure(after, 3)}"


def _join(*words: object) -> str:
    return " ".join(str(word) for word in words if word) or "-"


def _with_value(template: str, value: object) -> str:
    """Return ``template`` with the value in it; empty if the value is unknown."""
    return "" if value in (None, "") else template.format(value)


def _figure(value: object, digits: int = 4, unknown: str = "-") -> str:
    return f"{value:,.{digits}f}" if is_number(value) else unknown


def _memory(run: JsonObject) -> str:
    return size(run["peak_memory_bytes"]) if run["peak_memory_bytes"] else ""
