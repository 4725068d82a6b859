"""From YAML, or plain data, to a checked ``Recipe``.

An unknown key is refused with the nearest valid one, a value of another type is never converted, and ``conflicts`` has the last
word. Errors name file, line and key.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tunesmith import adaptations, objectives
from tunesmith.errors import RecipeError
from tunesmith.recipe import text as recipe_text
from tunesmith.recipe.conflicts import conflicts
from tunesmith.recipe.schema import DEFAULT_ADAPTATION, DEFAULT_OBJECTIVE, Recipe
from tunesmith.suggestions import closest, did_you_mean


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides (``train.learning_rate=1e-4``), and check it.

    Raises RecipeError naming the file, the line, the key, what was expected and the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"recipe not found: {path}\n  Type `tunesmith init sft --out {path.name}` to make one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    raw, tree = recipe_text.read(text, str(path))
    return _check(raw, recipe_text.Text(str(path), tree, tuple(overrides)))


def parse(raw: Any, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Check plain data (a dict as YAML would give it; paths may be ``Path``). ``raw`` is not changed."""
    return _check(_without_paths(raw), recipe_text.Text(where, None, tuple(overrides)))


def _check(raw: Any, text: recipe_text.Text) -> Recipe:
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{text.name}: expected a mapping of keys such as `model:` and `data:`, got {type(raw).__name__}"
        )
    for override in text.overrides:
        raw = recipe_text.apply(raw, override)
    raw, problems = dict(raw), []
    for part, package, default in (
        ("objective", objectives, DEFAULT_OBJECTIVE),
        ("adaptation", adaptations, DEFAULT_ADAPTATION),
    ):
        try:
            name, keys = _choose(part, raw.get(part, default), package.names(), text)
            raw[part] = _build(package.module(name).Config, keys, text, (part,))
        except RecipeError as error:
            problems.append(str(error))
            raw[part] = None
    try:
        recipe: Recipe = _build(Recipe, raw, text)
    except RecipeError as error:
        problems.append(str(error))
    if not problems:
        problems = [f"{text.name}: {problem}" for problem in conflicts(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _choose(part: str, value: Any, names: list[str], text: recipe_text.Text) -> tuple[str, dict[str, Any]]:
    """``lora`` or ``{type: lora, r: 8}`` -> ("lora", {"r": 8})."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        raise RecipeError(
            f"{text.at((part,))}: `{part}`: expected a name or a mapping with `type`, got {value!r}"
        )
    keys = dict(value)
    if "type" not in keys:
        meant = next((str(key) for key in keys if closest(str(key), ["type"])), None)
        if meant is not None:
            raise RecipeError(f"{text.at((part, meant))}: unknown key `{part}.{meant}`. Did you mean `type`?")
        raise RecipeError(f"{text.at((part,))}: the key `{part}.type` is missing. Valid: {', '.join(names)}")
    name = keys.pop("type")
    if name not in names:
        raise RecipeError(
            f"{text.at((part, 'type'))}: `{part}`: unknown type {name!r}. {did_you_mean(str(name), names)}"
        )
    return str(name), keys


def _build(
    model: type[BaseModel], values: dict[str, Any], text: recipe_text.Text, prefix: tuple[str, ...] = ()
) -> Any:
    """``values`` as ``model``; nothing is coerced (the text "8" is no number, true is not 1)."""
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, error.errors(), text, prefix))) from None


def _explain(
    model: type[BaseModel], errors: Sequence[Any], text: recipe_text.Text, prefix: tuple[str, ...]
) -> list[str]:
    """One line for each key that is wrong."""
    unknown_in = {error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden"}
    lines: list[str] = []
    expected: dict[tuple[str, str, str], list[str]] = {}
    for error in errors:
        loc = _key_path(model, error["loc"]) if error["type"] != "extra_forbidden" else error["loc"]
        key, where = ".".join(map(str, (*prefix, *loc))), text.at((*prefix, *loc))
        if error["type"] in ("extra_forbidden", "invalid_key"):
            valid = [
                *_keys_at(model, error["loc"][:-1]),
                *(["type"] if prefix and len(error["loc"]) == 1 else []),
            ]
            name = str(error["loc"][-1])
            owners = _owners(prefix[0], name) if prefix and len(error["loc"]) == 1 else []
            if owners:
                kinds = " or ".join(f"`{prefix[0]}.type: {owner}`" for owner in owners)
                here = ", ".join(sorted(valid))
                lines.append(
                    f"{where}: `{key}` belongs to {kinds}. Choose that, or leave the key out. Valid here: {here}"
                )
            else:
                elsewhere = _given_by(name) or _places(name)
                lines.append(f"{where}: unknown key `{key}`. {did_you_mean(name, valid, elsewhere)}")
        elif error["type"] == "missing":
            if error["loc"][:-1] not in unknown_in:  # else the unknown key is the missing one, mistyped
                lines.append(f"{where}: the key `{key}` is missing")
        elif error["type"] == "value_error":
            lines.append(f"{where}: {key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}")
        else:
            wanted = error["msg"].removeprefix("Input should be ")
            expected.setdefault((where, key, repr(error["input"])), []).append(wanted)
    lines += [
        f"{where}: `{key}`: expected {' or '.join(wanted)}, got {got}"
        for (where, key, got), wanted in expected.items()
    ]
    return lines


PARTS = {"objective": objectives, "adaptation": adaptations}
"""Keys of a recipe whose own keys depend on their ``type``."""


def _owners(part: str, name: str) -> list[str]:
    """The types of "objective" or "adaptation" that have a key of this name: ("adaptation", "r") -> ["lora"]."""
    return [kind for kind in PARTS[part].names() if name in PARTS[part].module(kind).Config.model_fields]


def _given_by(name: str) -> list[str]:
    """The key that says here what peft's key ``name`` says there, with an example."""
    known = [adaptations.module(choice).Adaptation.traits.peft_keys for choice in adaptations.names()]
    return list(dict.fromkeys(keys[name] for keys in known if name in keys))


def _places(name: str) -> list[str]:
    """Where a key of this name may stand in a recipe: ``max_length`` -> ``train.max_length``."""
    parts: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for part, package in PARTS.items():
        parts += [(f"{part}.", package.module(choice).Config) for choice in package.names()]
    found = []
    for prefix, model in parts:  # grows while it is read
        found += [prefix + name] if name in model.model_fields else []
        for key, field in model.model_fields.items():
            step = (
                ".NAME."
                if dict in _origins(field.annotation)
                else ".0."
                if list in _origins(field.annotation)
                else "."
            )
            parts += [(prefix + key + step, inner) for inner in _models_in(field.annotation)]
    return list(dict.fromkeys(found))


def _key_path(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """``loc`` without the names that pydantic adds for the branches of a union."""
    for length in range(1, len(loc) + 1):
        candidates, own_name = _inside(model, loc[: length - 1])
        if isinstance(loc[length - 1], str) and not own_name and loc[length - 1] not in _names_of(candidates):
            return loc[: length - 1]
    return loc


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The field names valid at ``loc`` inside ``model``."""
    return _names_of(_inside(model, loc)[0])


def _names_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in model.model_fields]


def _inside(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[list[type[BaseModel]], bool]:
    """(the models that ``loc`` may hold; whether a name of the user's comes next, as in ``data.eval.sets``)."""
    candidates: list[type[BaseModel]] = [model]
    own_name = False
    for part in loc:
        if isinstance(part, int) or own_name:  # a position, or a name that the user chose
            own_name = False
            continue
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        candidates = [inner for field in fields for inner in _models_in(field.annotation)]
        own_name = bool(candidates) and any(dict in _origins(field.annotation) for field in fields)
    return candidates, own_name


def _origins(annotation: Any) -> list[Any]:
    """What an annotation is made of: ``dict[str, Source] | None`` -> [union, dict, None]."""
    return [typing.get_origin(part) for part in (annotation, *typing.get_args(annotation))]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation such as ``list[Source] | None`` may hold."""
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list, tuple, dict, typing.Annotated):
        return [inner for arg in typing.get_args(annotation) for inner in _models_in(arg)]
    return []


def _without_paths(value: Any) -> Any:
    """``Path`` objects as the strings that YAML would hold."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
