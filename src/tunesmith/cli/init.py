"""``tunesmith init OBJECTIVE``: a commented recipe, made from the keys' own descriptions and defaults, so never out of date."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import result, say
from tunesmith.errors import UserError


def init(
    objective: Annotated[
        str,
        typer.Argument(
            help="What the loss is: sft, cpt, dpo, kto, reward, classify, tag, qa.", show_default=False
        ),
    ],
    adaptation: Annotated[str, typer.Option(help="Which weights are trained: full, lora, ...")] = "lora",
    model: Annotated[str, typer.Option(help="Model to start from.")] = "smollm2-135m",
    data: Annotated[
        str | None, typer.Option(help="File of training rows.", show_default="rows made for the objective")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write this file.", show_default="print it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a commented recipe."""
    text = recipe_text(objective, adaptation, model, data)
    if out is not None:
        try:
            with out.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{out} exists; nothing was written. Give another name with --out.") from None
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from None
        say(f"Wrote {out}. Next: tunesmith check {out}")
    if as_json or out is None:
        result({"recipe": text, "path": out}, as_json, lambda _: text.rstrip("\n"))


def recipe_text(objective: str, adaptation: str, model: str, data: str | None) -> str:
    """The recipe as commented YAML: a key with a default stands at its default, one without is commented out.

    ``data``: a file; None = rows made for the objective.
    """
    from tunesmith import objectives
    from tunesmith import recipe as schema

    source = {"path": data or "-"}
    if not data and objective in objectives.names():  # parse names the nearest to an unknown one
        source = dict(objectives.module(objective).Objective.traits.starter)
    start = {"model": model, "objective": objective, "adaptation": adaptation, "data": {"train": [source]}}
    recipe = schema.parse(start, where="init")
    parts = {"objective": (objective, recipe.objective), "adaptation": (adaptation, recipe.adaptation)}
    lines = [
        f"# {objective} with {adaptation}: run it with `tunesmith train THIS_FILE`, look before with `tunesmith check THIS_FILE`."
    ]
    for key, field in type(recipe).model_fields.items():
        if key in parts:
            name, config = parts[key]
            lines += ["", f"{key}:{_comment(field)}", f"  type: {name}", *_lines(config, "  ")]
        else:
            lines += ["", *_entry(key, field, getattr(recipe, key), "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _lines(config: Any, indent: str) -> list[str]:
    return [
        line
        for key, field in type(config).model_fields.items()
        for line in _entry(key, field, getattr(config, key), indent)
    ]


def _entry(key: str, field: Any, value: Any, indent: str) -> list[str]:
    """The lines of one key: a scalar, a nested part, or a list of parts."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return [f"{indent}{key}:{_comment(field)}", *_lines(value, indent + "  ")]
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        first, *rest = _lines(value[0], indent + "    ")
        return [f"{indent}{key}:{_comment(field)}", f"{indent}  - {first.strip()}", *rest]
    if value is None:
        return [f"{indent}# {key}:{_comment(field)}"]
    return [f"{indent}{key}: {_scalar(value)}{_comment(field)}"]


def _comment(field: Any) -> str:
    """Description and choices of a key, as a trailing comment."""
    choices = " | ".join(_choices(field.annotation))
    words = ": ".join(filter(None, [choices, field.description or ""]))
    return f"  # {words}" if words else ""


def _choices(annotation: Any) -> list[str]:
    """The words that may stand as the value, when nothing else may: ``Literal["auto", "off"] | None`` -> auto, off."""
    inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in inner]
    return _choices(inner[0]) if len(inner) == 1 else []


def _scalar(value: Any) -> str:
    """A value in YAML on one line."""
    from tunesmith.recipe.text import dump

    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return dump(value, one_line=True).strip()
