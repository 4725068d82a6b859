"""``tunesmith launch --processes N RECIPE [key=value ...]``: train with several processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli import options


def launch(
    processes: Annotated[int, typer.Option("--processes", "-n", min=1, help="At most one for each GPU.")],
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    out: options.Out = None,
    resume: options.Resume = False,
    restart: options.Restart = False,
    deepspeed: options.DeepSpeed = None,
    language: options.Language = None,
    as_json: options.Json = False,
) -> None:
    """Train with several processes on this machine. The updates are those of one process, in less time."""
    from tunesmith.recipe import load
    from tunesmith.runs import run_folder

    checked = load(recipe, overrides or ())  # report a wrong recipe before any process starts
    # report a run folder that is in use, too; the main process locks the folder again
    run_folder.claim(out or Path("runs") / recipe.stem, run_folder.start_of(resume, restart)).close()

    from tunesmith.train.distributed import check_processes
    from tunesmith.train.launch import launch as start

    check_processes(processes, checked.train.batch_size, "train.batch_size is")
    arguments = ["train", str(recipe), *(overrides or ())]
    arguments += ["--out", str(out)] if out else []
    arguments += ["--resume"] if resume else ["--restart"] if restart else []
    arguments += ["--deepspeed", str(deepspeed)] if deepspeed else []
    arguments += ["--json"] if as_json else []
    start(processes, arguments)
