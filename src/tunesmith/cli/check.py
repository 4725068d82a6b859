"""``tunesmith check RECIPE [key=value ...]``: everything that can be known before training, and nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import plain, result, say


def check(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see `tunesmith init`.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=2.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Tell all that can be known before training: rows, masks, steps, parameters, precision, memory."""
    from tunesmith.recipe import load

    checked = load(recipe, overrides or ())

    from tunesmith.engine import run

    result(run.check(checked), as_json, lambda found: "\n".join(lines(plain(found))))
    say("This recipe can run.")


def lines(found: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested figures, one a line, indented by depth."""
    out: list[str] = []
    for key, value in found.items():
        label = f"{indent}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            out += [label, *lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            out.append(label)
            for item in value:
                first, *rest = lines(item, indent + "    ")
                out += [f"{indent}  - {first.strip()}", *rest]
        else:
            out.append(f"{label:<28} {_figure(key, value)}")
    return out


def _figure(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
