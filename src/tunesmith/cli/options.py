"""Arguments and options that more than one verb has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=2.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME of the recipe")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")]
DeepSpeed = Annotated[
    Path | None, typer.Option(help="Your ds_config.json: ZeRO-2, each process with a part.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
