"""Arguments and options that more than one verb has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=2.", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME of the recipe")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")]
DeepSpeed = Annotated[
    Path | None,
    typer.Option(help="Your ds_config.json: ZeRO-2, each process with a part.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

Predictions = Annotated[
    Path | None,
    typer.Option(help="New jsonl file: one object for each row, in order.", show_default="stdout"),
]
Format = Annotated[str | None, typer.Option(help="Format of the rows.", show_default="detected")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N rows only.", show_default=False)]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a row.", show_default="the model's window")
]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic of the forward pass.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; never changes the result.")]
Split = Annotated[str, typer.Option(help="Of a data set of the Hub.")]
Name = Annotated[
    str | None,
    typer.Option(help="Of a data set of the Hub with several configurations: which.", show_default=False),
]
Streaming = Annotated[
    bool, typer.Option(help="Of a data set of the Hub: rows over the network, no file of it.")
]
