"""``tunesmith launch --processes N RECIPE [key=value ...]``: train with several processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch(
    processes: Annotated[int, typer.Option("--processes", "-n", min=1, help="How many; at most one for each GPU.")],
    recipe: Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=2.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME of the recipe")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")] = False,
    deepspeed: Annotated[
        Path | None, typer.Option(help="Your ds_config.json: ZeRO-2, each process with a part.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train with several processes on this machine: the update of one process, in less time."""
    from tunesmith.recipe import load

    checked = load(recipe, overrides or ())  # a wrong recipe starts nothing

    from tunesmith.engine.batching import check_processes

    check_processes(processes, checked.train.batch_size, "train.batch_size is")

    from tunesmith.engine.launch import launch as start

    arguments = ["train", str(recipe), *(overrides or ())]
    arguments += ["--out", str(out)] if out else []
    arguments += ["--resume"] if resume else []
    arguments += ["--deepspeed", str(deepspeed)] if deepspeed else []
    arguments += ["--json"] if as_json else []
    start(processes, arguments)
