"""``tunesmith adapters list | combine``: list adapters, and combine several into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("list")
def list_adapters(
    folders: Annotated[list[str] | None, typer.Argument(help="Where to search.", show_default="runs")] = None,
    as_json: options.Json = False,
) -> None:
    """List the adapters under folders: type, rank, base, size, held-out loss. Loads no weights."""
    from tunesmith.models.adapters.adapter_set import find

    by_path = {adapter["path"]: adapter for folder in folders or ["runs"] for adapter in find(folder)}
    print_result({"adapters": list(by_path.values())}, as_json, _table)


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Two or more LoRA adapter or run folders.")],
    out: Annotated[Path, typer.Option(help="New folder for the combined adapter.")],
    weights: Annotated[str | None, typer.Option(help="Such as 0.7,0.3.", show_default="equal")] = None,
    method: Annotated[str, typer.Option(help="cat (exact), svd (rank --r), linear (peft's).")] = "cat",
    r: Annotated[int | None, typer.Option("--r", help="Rank for svd.", show_default="the largest")] = None,
    as_json: options.Json = False,
) -> None:
    """Combine several LoRA adapters of one base into one: their weighted sum."""
    from tunesmith.merge.combine import combine as combine_adapters

    print_stderr(f"combining {len(adapters)} adapters")
    facts = combine_adapters(adapters, out, weights=_parse_weights(weights), method=method, r=r)
    print_result(facts, as_json, _summary)


def _parse_weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights: expected numbers such as 0.7,0.3, got {text!r}") from None


def _table(facts: JsonObject) -> RenderableType | list[RenderableType]:
    if not facts["adapters"]:
        return "no adapters there"
    heads = ("path", "type", "r", "base", "parameters", "kB", "held-out loss")
    table = Table(*heads, box=None, padding=(0, 2, 0, 0))
    broken: list[RenderableType] = []
    here = Path.cwd()
    for one in facts["adapters"]:
        is_below = Path(one["path"]).is_relative_to(here)
        path = str(Path(one["path"]).relative_to(here)) if is_below else one["path"]
        if one["problem"]:
            broken.append(f"{path} cannot be read: {one['problem']}")
            continue
        loss = "" if one["eval_loss"] is None else f"{one['eval_loss']:.4f}"
        sizes = (f"{one['parameters']:,}", f"{one['bytes'] / 1000:,.0f}")
        table.add_row(path, one["type"], str(one["r"] or ""), str(one["base"]), *sizes, loss)
    return [*([table] if table.rows else []), *broken]


def _summary(facts: JsonObject) -> str:
    distances = ", ".join(f"{name} {value:.2g}" for name, value in facts["distances"].items())
    parts = " + ".join(f"{part['weight']:g} x {part['path']}" for part in facts["parts"])
    return (
        f"{parts}\n{facts['path']}: a LoRA of rank {facts['r']} on {facts['base']}\n"
        f"relative distance from the exact weighted sum: {distances} ({facts['method']} was written)"
    )
