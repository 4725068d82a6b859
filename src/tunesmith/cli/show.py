"""``tunesmith show MODEL``: describe a model folder without loading it."""

from __future__ import annotations

from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.output import print_result
from tunesmith.json_types import JsonObject

_KEYS = (
    "path", "kind", "architecture", "layers", "base", "origin", "head", "tied_embeddings", "context_window", "quantization",
)  # fmt: skip


def show(model: options.Model, as_json: options.Json = False) -> None:
    """Describe a model folder: architecture, base, adapter, head, parameters, template. Loads no weights."""
    from tunesmith.models.find.folder_summary import show as summarise

    print_result(summarise(model), as_json, _table)


def _table(facts: JsonObject) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key in _KEYS:
        if facts[key] is not None:
            table.add_row(key, str(facts[key]))
    if adapter := facts["adapter"]:
        given = {key: value for key, value in adapter.items() if value is not None}
        table.add_row("adapter", ", ".join(f"{key}={value}" for key, value in given.items()))
    for kind, part in facts["parameters"].items():
        table.add_row(f"parameters: {kind}", f"{part['count']:,} {'/'.join(part['dtypes'])}")
    table.add_row("parameters: total", f"{facts['total_parameters']:,}{' (base)' if adapter else ''}")
    template = facts["chat_template"]
    table.add_row("chat template", template["first_line"] if template["present"] else "none")
    table.add_row("stop tokens", " ".join(template["stop_tokens"]) or "none")
    if facts["run"]:
        table.add_row("run", facts["run"]["path"])
    if facts["saved_with"]:
        versions = (f"{name} {version}" for name, version in facts["saved_with"].items())
        table.add_row("saved with", ", ".join(versions))
    return table
