"""``tunesmith runs list | show | compare | reproduce``: what became of runs, side by side, and one of them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tunesmith.cli.output import columns, console, result, say
from tunesmith.errors import NotReproduced, UserError
from tunesmith.runs.figure_format import duration, is_number, lower_is_better, number, size, typed

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show, compare and repeat runs.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Every run under a folder, the oldest first: state, what it trained, loss before and after, speed, memory."""
    from tunesmith.runs import run_list as runs

    result({"runs": [run.facts() for run in runs.find(folder)]}, as_json, _listed)


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)], as_json: Json = False
) -> None:
    """All that a run's folder says of it: recipe, data, machine, result."""
    from tunesmith.runs import run_list as runs

    kept = runs.read(run)
    result({**kept.facts(), "recipe": kept.recipe, "manifest": kept.manifest}, as_json, _shown)


@app.command("compare")
def compare_runs(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, two or more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Write the curves into this PNG.")] = Path("compare.png"),
    by: Annotated[str, typer.Option(help="What the curves run over: step or tokens.")] = "step",
    as_json: Json = False,
) -> None:
    """Curves of several runs over each other, what differs between their recipes, and their results side by side."""
    from tunesmith.report import charts
    from tunesmith.runs import compare
    from tunesmith.runs import run_list as runs

    if len(folders) < 2 or by not in ("step", "tokens"):
        raise UserError(
            "compare takes two or more runs, and --by is step or tokens: tunesmith runs compare runs/a runs/b"
        )
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; expected a name that ends in .png")
    kept = [runs.read(folder) for folder in folders]
    found = {
        "runs": [run.facts() for run in kept],
        "differences": compare.differences(kept),
        "cautions": compare.cautions(kept),
        "picture": str(out),
    }
    try:
        out.write_bytes(charts.png(charts.compare(compare.losses(kept, by), by)))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    result(found, as_json, lambda found: _compared(found, compare.names(kept)))


@app.command("reproduce")
def reproduce(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="New run folder.", show_default="RUN-again")] = None,
    as_json: Json = False,
) -> int:
    """Train a finished run again from its own recipe and say whether it came out equal, bit for bit."""
    from tunesmith.train.reproduce import reproduce as repeat

    found = repeat(run, out, console())
    result(found, as_json, _repeated)
    if not found["equal"]:
        say(
            f"error: {found['again']} is not the same as {found['run']}; the new run is kept, to be compared."
        )
        return NotReproduced.exit_code
    say("The same, bit for bit.")
    return 0


def _listed(found: Mapping[str, Any]) -> Any:
    if not found["runs"]:
        return "no runs"
    rows = [_row(run) for run in found["runs"]]
    heads = [head for head in rows[0] if head != "figure" or any(row[head] != "-" for row in rows)]
    # A line for each run: what is told least of leaves a narrow terminal first.
    for least in ("memory", "started", "model", "tokens/s"):
        if sum(max(len(head), *(len(row[head]) for row in rows)) + 2 for head in heads) - 2 <= columns():
            break
        heads.remove(least)
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    return [table, *(f"unreadable: {run['problem']}" for run in found["runs"] if run["problem"])]


def _row(run: Mapping[str, Any]) -> dict[str, str]:
    """Heading -> what the list says of a run."""
    steps = str(run["step"]) + (
        f"/{run['planned_steps']}" if run["planned_steps"] and run["state"] != "done" else ""
    )
    return {
        "run": Path(run["run"]).name,
        "state": run["state"],
        "what": _joined(run["objective"], run["adaptation"]),
        "model": Path(str(run["model"] or "-")).name,
        "steps": "-" if run["state"] == "unreadable" else steps,
        "loss": f"{_figure(run['eval_loss_before'], 3)} -> {_figure(run['eval_loss'], 3)}",
        "figure": next(
            (_change(name, *both) for name, both in run["figures"].items() if lower_is_better(name) is False),
            "-",
        ),
        "tokens/s": _figure(run["tokens_per_second"], 0),
        "memory": size(run["peak_memory_bytes"]) if run["peak_memory_bytes"] else "-",
        "started": str(run["created"] or "")[5:16].replace("T", " ") or "-",
    }


def _shown(found: Mapping[str, Any]) -> str:
    manifest = found["manifest"]
    data, parameters, made = (
        manifest.get("data") or {},
        manifest.get("parameters") or {},
        manifest.get("machine") or {},
    )
    taken = (manifest.get("result") or {}).get("train_seconds")
    is_unfinished, versions = found["state"] in ("killed", "stopped"), made.get("versions") or {}
    planned = f" of {found['planned_steps']}" if found["planned_steps"] else ""
    saved = (
        "no checkpoint" if found["checkpoint"] is None else f"last checkpoint at step {found['checkpoint']}"
    )
    how = _joined(found["objective"], found["adaptation"] and f"with {found['adaptation']}")
    # Without a result the figures are of the records: as far as the run came.
    losses = (
        _told("{} before", _figure(found["eval_loss_before"], none=None)),
        _told(
            "{} after" if manifest.get("result") else "{} at best so far",
            _figure(found["eval_loss"], none=None),
        ),
    )
    machine = (
        _told("{}", made.get("cpu")), _told("{} threads", made.get("threads")), _told("torch {}", versions.get("torch"))
    )  # fmt: skip
    lines = [
        ("run", found["run"]),
        ("state", f"{found['state']}, step {found['step']}{planned}{f', {saved}' if is_unfinished else ''}"),
        ("", str(found["stopped"] or "")),
        ("started", "  ".join(filter(None, (found["created"], typed(manifest.get("command") or ""))))),
        ("model", f"{found['model']}  {how}{_told(', seed {}', manifest.get('seed'))}"),
        (
            "parameters",
            f"{parameters.get('trainable', 0):,} trained of {parameters.get('total', 0):,}"
            if parameters
            else "",
        ),
        *(
            ("data", f"{one['path']}  {one['rows_kept']:,} rows  sha256 {one['sha256'][:12]}")
            for one in data.get("sources", ())
        ),
        ("loss", ", ".join(filter(None, losses)) + _told(" (step {})", found["best_step"])),
        ("figures", ", ".join(_change(name, *both) for name, both in found["figures"].items())),
        (
            "speed",
            _told("{} tokens/s", _figure(found["tokens_per_second"], 0, None))
            + (f", {duration(taken)}" if taken else ""),
        ),
        ("memory", size(found["peak_memory_bytes"]) if found["peak_memory_bytes"] else ""),
        ("machine", ", ".join(filter(None, machine))),
        *(("note", note) for note in manifest.get("notes") or ()),
        ("next", f"tunesmith runs reproduce {shlex.quote(found['run'])}" if found["state"] == "done" else ""),
        ("next", _go_on(found["run"], manifest) if is_unfinished else ""),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in lines if text)


def _go_on(run: str, manifest: Mapping[str, Any]) -> str:
    """The command that resumes a run, with the processes and the DeepSpeed configuration that it had."""
    processes = manifest.get("processes") or 1
    verb = f"launch --processes {processes}" if processes > 1 else "train"
    given = re.search(r"--deepspeed[ =](\S+)", str(manifest.get("command")))
    sharded = f" --deepspeed {given.group(1) if given else 'FILE.json'}" if manifest.get("deepspeed") else ""
    return f"tunesmith {verb} {shlex.quote(f'{run}/recipe.yaml')} --out {shlex.quote(run)}{sharded} --resume"


def _compared(found: Mapping[str, Any], names: list[str]) -> list[Any]:
    from tunesmith.runs.compare import shortened

    table = Table(title="Recipes: what differs; results", title_justify="left")
    # The key column keeps its width: a key that is cut may look like another.
    table.add_column(
        "", overflow="fold", min_width=min(36, max(map(len, [*found["differences"], "tokens_per_second"])))
    )
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in found["differences"].items():
        table.add_row(key, *map(str, shortened(values)))
    table.add_section()
    runs = found["runs"]
    for key in ("processes", "sharded"):
        values = [str(run[key]) for run in runs]
        if len(set(values)) > 1:
            table.add_row(key, *values)

    def shown(key: str, values: Iterable[Any]) -> None:
        table.add_row(key, *(number(value) if is_number(value) else str(value or "-") for value in values))

    for key in (
        "state",
        "eval_loss_before",
        "eval_loss",
        *(("perplexity",) if any(run["perplexity"] for run in runs) else ()),
    ):
        shown(key, (run[key] for run in runs))
    for name in dict.fromkeys(name for run in runs for name in run["figures"]):
        for place, key in enumerate((f"{name}_before", name)):
            shown(key, (run["figures"].get(name, (None, None))[place] for run in runs))
    for key in ("best_step", "tokens_per_second", "tokens"):
        shown(key, (run[key] for run in runs))
    table.add_row(
        "peak_memory",
        *(size(run["peak_memory_bytes"]) if run["peak_memory_bytes"] else "-" for run in found["runs"]),
    )
    return [table, *found["cautions"], f"curves      {found['picture']}"]


def _repeated(found: Mapping[str, Any]) -> str:
    lines = [f"run         {found['run']}", f"again       {found['again']}"]
    lines += [f"other now   {key}: was {old}, is {new}" for key, (old, new) in found["machine"].items()]
    if found["difference"]:
        one = found["difference"]
        lines.append(
            f"records     first difference at step {one['step']}: {one['figure']} was {one['before']}, is {one['now']}"
        )
        if one := found["furthest"]:
            lines.append(
                f"            furthest at step {one['step']}: {one['figure']} was {one['before']}, is {one['now']}"
            )
    else:
        lines.append(f"records     all {found['records']} are the same")
    lines.append(f"weights     {'the same' if found['weights_equal'] else 'not the same'}")
    return "\n".join(lines)


def _change(name: str, before: Any, after: Any) -> str:
    """``accuracy 0.512 -> 0.841``."""
    return f"{name.removeprefix('eval_')} {_figure(before, 3)} -> {_figure(after, 3)}"


def _joined(*words: Any) -> str:
    return " ".join(str(word) for word in words if word) or "-"


def _told(words: str, value: Any) -> str:
    """``words`` with the value in them; empty when it is not known."""
    return "" if value is None else words.format(value)


def _figure(value: Any, digits: int = 4, none: Any = "-") -> Any:
    return f"{value:,.{digits}f}" if is_number(value) else none
