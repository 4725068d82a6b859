"""From YAML, or plain data, to a checked ``Recipe``.

An unknown key is refused with the nearest valid one, a value of another type is never converted, and
``conflicts`` is checked last. Errors name file, line and key.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tunesmith import adaptations, objectives
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.recipe import text as recipe_text
from tunesmith.recipe.conflicts import conflicts
from tunesmith.recipe.schema import DEFAULT_ADAPTATION, DEFAULT_OBJECTIVE, Recipe
from tunesmith.suggestions import closest, did_you_mean

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PARTS = {"objective": objectives, "adaptation": adaptations}
"""Keys of a recipe whose own keys depend on their ``type``."""

Model = typing.TypeVar("Model", bound=BaseModel)


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


def parse(raw: object, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Check plain data (a dict as YAML would return it; paths may be ``Path``). ``raw`` is not changed."""
    return _check(_without_paths(raw), recipe_text.Text(where, None, tuple(overrides)))


def _check(raw: object, text: recipe_text.Text) -> Recipe:
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{text.name}: expected a mapping of keys such as `model:` and `data:`, got {type(raw).__name__}"
        )
    for override in text.overrides:
        raw = recipe_text.apply(raw, override)
    values, problems = dict(raw), []
    for part, default in (("objective", DEFAULT_OBJECTIVE), ("adaptation", DEFAULT_ADAPTATION)):
        try:
            name, keys = _choose(part, values.get(part, default), text)
            values[part] = _build(PARTS[part].module(name).Config, keys, text, (part,))
        except RecipeError as error:
            problems.append(str(error))
            values[part] = None
    try:
        recipe = _build(Recipe, values, text)
    except RecipeError as error:
        problems.append(str(error))
    if not problems:
        problems = [f"{text.name}: {problem}" for problem in conflicts(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _choose(part: str, value: object, text: recipe_text.Text) -> tuple[str, JsonObject]:
    """``lora`` or ``{type: lora, r: 8}`` -> ("lora", {"r": 8})."""
    names = PARTS[part].names()
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        raise RecipeError(
            f"{text.at((part,))}: `{part}`: expected a name or a mapping with `type`, got {value!r}"
        )
    keys = dict(value)
    if "type" not in keys:
        slip = next((str(key) for key in keys if closest(str(key), ["type"])), None)
        if slip is not None:
            raise RecipeError(f"{text.at((part, slip))}: unknown key `{part}.{slip}`. Did you mean `type`?")
        raise RecipeError(f"{text.at((part,))}: the key `{part}.type` is missing. Valid: {', '.join(names)}")
    name = keys.pop("type")
    if name not in names:
        raise RecipeError(
            f"{text.at((part, 'type'))}: `{part}`: unknown type {name!r}. {did_you_mean(str(name), names)}"
        )
    return str(name), keys


def _build(
    model: type[Model], values: JsonObject, text: recipe_text.Text, prefix: tuple[str, ...] = ()
) -> Model:
    """Make a ``model`` of ``values`` without converting any (the text "8" is no number, true is not 1)."""
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, error.errors(), text, prefix))) from None


def _explain(
    model: type[BaseModel], errors: Sequence[ErrorDetails], text: recipe_text.Text, prefix: tuple[str, ...]
) -> list[str]:
    """A line for each key that is wrong."""
    unknown_in = {error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden"}
    lines: list[str] = []
    expected: dict[tuple[str, str, str], list[str]] = {}
    for error in errors:
        path = error["loc"] if error["type"] == "extra_forbidden" else _key_path(model, error["loc"])
        key, where = ".".join(map(str, (*prefix, *path))), text.at((*prefix, *path))
        if error["type"] in ("extra_forbidden", "invalid_key"):
            lines.append(f"{where}: {_explain_unknown(model, key, error['loc'], prefix)}")
        elif error["type"] == "missing":
            if (
                error["loc"][:-1] not in unknown_in
            ):  # else the unknown key is probably the missing one, mistyped
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


def _explain_unknown(
    model: type[BaseModel], key: str, path: Sequence[str | int], prefix: tuple[str, ...]
) -> str:
    """``unknown key `train.epoch`. Did you mean ...``, or the types that have this key."""
    name, valid = str(path[-1]), _names_of(_models_at(model, path[:-1])[0])
    if prefix and len(path) == 1:
        part, valid = prefix[0], [*valid, "type"]
        if owners := [kind for kind, keys in _configs(part).items() if name in keys.model_fields]:
            kinds = " or ".join(f"`{part}.type: {owner}`" for owner in owners)
            return f"`{key}` belongs to {kinds}. Choose that, or leave the key out. Valid here: {', '.join(sorted(valid))}"
    return f"unknown key `{key}`. {did_you_mean(name, valid, _from_peft(name) or _places(name))}"


def _configs(part: str) -> dict[str, type[BaseModel]]:
    """The ``Config`` of each type of "objective" or "adaptation"."""
    return {kind: PARTS[part].module(kind).Config for kind in PARTS[part].names()}


def _from_peft(name: str) -> list[str]:
    """The recipe's key with the meaning of peft's key ``name``, with an example."""
    known = [adaptations.module(choice).Adaptation.traits.peft_keys for choice in adaptations.names()]
    return list(dict.fromkeys(keys[name] for keys in known if name in keys))


def _places(name: str) -> list[str]:
    """Every valid position of a key of this name in a recipe: ``max_length`` -> ``train.max_length``."""
    models: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    models += [(f"{part}.", config) for part in PARTS for config in _configs(part).values()]
    places = []
    for prefix, model in models:  # grows in the loop
        places += [prefix + name] if name in model.model_fields else []
        for key, field in model.model_fields.items():
            origins = _origins(field.annotation)
            step = ".NAME." if dict in origins else ".0." if list in origins else "."
            models += [(prefix + key + step, inner) for inner in _models_in(field.annotation)]
    return list(dict.fromkeys(places))


def _key_path(model: type[BaseModel], path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``path`` without the names that pydantic adds for the branches of a union."""
    for length, part in enumerate(path):
        candidates, is_name = _models_at(model, path[:length])
        if isinstance(part, str) and not is_name and part not in _names_of(candidates):
            return path[:length]
    return path


def _names_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in model.model_fields]


def _models_at(model: type[BaseModel], path: Sequence[str | int]) -> tuple[list[type[BaseModel]], bool]:
    """(the models that may be at ``path``; whether the user chooses the next key, as a set's name)."""
    candidates: list[type[BaseModel]] = [model]
    is_name = False
    for part in path:
        if isinstance(part, int) or is_name:  # a list position, or a name that the user chose
            is_name = False
            continue
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        candidates = [inner for field in fields for inner in _models_in(field.annotation)]
        is_name = bool(candidates) and any(dict in _origins(field.annotation) for field in fields)
    return candidates, is_name


def _origins(annotation: object) -> list[object]:
    """The parts of an annotation: ``dict[str, Source] | None`` -> [union, dict, None]."""
    return [typing.get_origin(part) for part in (annotation, *typing.get_args(annotation))]


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models in an annotation such as ``list[Source] | None``."""
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list, tuple, dict, typing.Annotated):
        return [inner for arg in typing.get_args(annotation) for inner in _models_in(arg)]
    return []


def _without_paths(value: object) -> object:
    """Replace ``Path`` objects by the strings that YAML would hold."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
