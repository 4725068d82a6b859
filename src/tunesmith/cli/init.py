"""``tunesmith init OBJECTIVE``: a commented recipe, generated from the keys' descriptions and defaults."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith import files
from tunesmith.cli import options
from tunesmith.cli.output import print_result, print_stderr
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject


def init(
    objective: Annotated[
        str, typer.Argument(help="sft, cpt, dpo, kto, grpo, ppo, reward, classify, tag or qa.")
    ],
    adaptation: Annotated[str, typer.Option(help="The weights to train: full, lora, ...")] = "lora",
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    data: Annotated[str | None, typer.Option(help="Training rows.", show_default="built-in rows")] = None,
    out: Annotated[Path | None, typer.Option(help="Write this new file.", show_default="print it")] = None,
    as_json: options.Json = False,
) -> None:
    """Write a commented recipe."""
    text = recipe_text(objective, adaptation, model, data)
    if out is not None:
        if out.exists():
            raise UserError(f"{out} exists already; name a new file with --out")
        try:
            files.replace_file(out, text.encode())
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}. Choose another --out") from None
        print_stderr(f"Wrote {out}. Next: tunesmith check {out}")
    if as_json or out is None:
        print_result({"recipe": text, "path": out}, as_json, lambda _: text.rstrip("\n"))


def recipe_text(objective: str, adaptation: str, model: str, data: str | None) -> str:
    """Return a recipe as commented YAML: keys with their defaults; keys without a default are commented out.

    ``data``: a file; None = rows made for the objective.
    """
    from tunesmith import objectives
    from tunesmith import recipe as schema

    source: JsonObject = {"path": data or "-"}
    keys: JsonObject = {}
    if objective in objectives.names():  # schema.parse reports an unknown name
        traits: objectives.Traits = objectives.module(objective).Objective.traits
        source = source if data else dict(traits.starter)
        keys = dict(traits.starter_keys)
    start = {
        "model": model,
        "objective": {"type": objective, **keys},
        "adaptation": adaptation,
        "data": {"train": [source]},
    }
    recipe = schema.parse(start, where="init")
    parts = {"objective": objective, "adaptation": adaptation}
    lines = [
        f"# {objective} with {adaptation}. Check: `tunesmith check THIS_FILE`. Run: `tunesmith train THIS_FILE`."
    ]
    for key, value in recipe:
        field = type(recipe).model_fields[key]
        if key in parts:
            lines += ["", f"{key}:{_comment(field)}", f"  type: {parts[key]}", *_lines(value, "  ")]
        else:
            lines += ["", *_entry(key, field, value, "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _lines(config: BaseModel, indent: str) -> list[str]:
    fields = type(config).model_fields
    return [line for key, value in config for line in _entry(key, fields[key], value, indent)]


def _entry(key: str, field: FieldInfo, value: object, indent: str) -> list[str]:
    """Return the lines of one key: a scalar, a nested part, or a list of parts."""
    if isinstance(value, BaseModel):
        return [f"{indent}{key}:{_comment(field)}", *_lines(value, indent + "  ")]
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        items = [_lines(item, indent + "    ") for item in value]
        shown = [line for first, *rest in items for line in (f"{indent}  - {first.strip()}", *rest)]
        return [f"{indent}{key}:{_comment(field)}", *shown]
    if value is None:
        return [f"{indent}# {key}:{_comment(field)}"]
    return [f"{indent}{key}: {_scalar(value)}{_comment(field)}"]


def _comment(field: FieldInfo) -> str:
    """Return description and choices of a key as a trailing comment."""
    text = ": ".join(filter(None, [" | ".join(_choices(field.annotation)), field.description or ""]))
    return f"  # {text}" if text else ""


def _choices(annotation: object) -> list[str]:
    """Return the choices of a Literal or an optional one: ``Literal["auto", "off"] | None`` -> auto, off."""
    arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in arguments]
    return _choices(arguments[0]) if len(arguments) == 1 else []


def _scalar(value: object) -> str:
    """Return a value as one line of YAML."""
    from tunesmith.recipe.text import dump

    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return dump(value, one_line=True).strip()
