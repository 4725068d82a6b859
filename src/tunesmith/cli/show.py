"""``tunesmith show MODEL``: what a model folder is, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result


def show(
    model: Annotated[str, typer.Argument(help="catalog name, model folder, adapter folder or run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tell what a model folder is: architecture, base, adapter, head, parameters, template, run. Loads no weights."""
    from tunesmith.models.find.folder_summary import show as facts

    result(facts(model), as_json, _table)


def _table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key in (
        "path",
        "kind",
        "architecture",
        "layers",
        "base",
        "origin",
        "head",
        "tied_embeddings",
        "context_window",
        "quantization",
    ):
        if facts[key] is not None:
            table.add_row(key, str(facts[key]))
    if facts["adapter"]:
        table.add_row(
            "adapter",
            ", ".join(f"{key}={value}" for key, value in facts["adapter"].items() if value is not None),
        )
    for kind, part in facts["parameters"].items():
        table.add_row(f"parameters: {kind}", f"{part['count']:,} {'/'.join(part['dtypes'])}")
    table.add_row(
        "parameters: total", f"{facts['total_parameters']:,}" + (" (base)" if facts["adapter"] else "")
    )
    template = facts["chat_template"]
    table.add_row("chat template", template["first_line"] if template["present"] else "none")
    table.add_row("stop tokens", " ".join(template["stop_tokens"]) or "none")
    if facts["run"]:
        table.add_row("run", facts["run"]["path"])
    if facts["saved_with"]:
        table.add_row(
            "saved with", ", ".join(f"{name} {version}" for name, version in facts["saved_with"].items())
        )
    return table
