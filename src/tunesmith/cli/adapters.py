"""``tunesmith adapters list | combine``: which adapters there are, and several as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Json
from tunesmith.cli.output import result, say
from tunesmith.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("list")
def list_(
    where: Annotated[
        list[str] | None, typer.Argument(help="Folders to look in.", show_default="runs")
    ] = None,
    as_json: Json = False,
) -> None:
    """The adapters that lie under folders: kind, rank, base, size, held-out loss. Loads no weights."""
    from tunesmith.models.adapters.adapter_set import find

    found = [one for folder in where or ["runs"] for one in find(folder)]
    result({"adapters": list({one["path"]: one for one in found}.values())}, as_json, _table)


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(help="Two or more LoRA adapter or run folders.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New folder for the combined adapter.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="One for each, such as 0.7,0.3.", show_default="the mean")
    ] = None,
    method: Annotated[
        str, typer.Option(help="cat (the exact sum), svd (its nearest of rank --r) or linear (peft's).")
    ] = "cat",
    r: Annotated[
        int | None, typer.Option("--r", help="Rank, for svd.", show_default="the largest of the parts")
    ] = None,
    as_json: Json = False,
) -> None:
    """The weighted sum of several LoRA adapters of one base, as one LoRA."""
    from tunesmith.merge.combine import combine as sum_up

    say(f"combining {len(adapters)} adapters")
    result(sum_up(adapters, out, weights=_numbers(weights), method=method, r=r), as_json, _report)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights: expected numbers with commas between them, such as 0.7,0.3, got {text!r}"
        ) from None


def _table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    if not facts["adapters"]:
        return "no adapters there"
    whole = [one for one in facts["adapters"] if not one["problem"]]
    broken = [
        f"{_short(one['path'])} cannot be read: {one['problem']}"
        for one in facts["adapters"]
        if one["problem"]
    ]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("path", "type", "r", "base", "parameters", "kB", "held-out loss"):
        table.add_column(head)
    for one in whole:
        loss = "" if one["eval_loss"] is None else f"{one['eval_loss']:.4f}"
        table.add_row(
            _short(one["path"]), one["type"], str(one["r"] or ""), str(one["base"]), f"{one['parameters']:,}",
            f"{one['bytes'] / 1000:,.0f}", loss,
        )  # fmt: skip
    return [*([table] if whole else []), *broken]


def _short(path: str) -> str:
    """From here, where that is shorter."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _report(facts: Mapping[str, Any]) -> str:
    apart = ", ".join(f"{name} {value:.2g}" for name, value in facts["distances"].items())
    parts = " + ".join(f"{part['weight']:g} x {part['path']}" for part in facts["parts"])
    return (
        f"{parts}\n{facts['path']}: a LoRA of rank {facts['r']} on {facts['base']}\n"
        f"relative distance from the exact weighted sum: {apart} ({facts['method']} was written)"
    )
