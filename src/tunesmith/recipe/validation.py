"""From YAML, or plain data, to a checked ``Recipe``.

An unknown key is refused with the nearest valid one, a value of another type is never converted, and
``conflicts`` is checked last. Errors name file, line and key.
"""

from __future__ import annotations

import os
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tunesmith import adaptations, objectives
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.recipe import foreign_keys, foreign_values
from tunesmith.recipe import text as recipe_text
from tunesmith.recipe.conflicts import ALTERNATIVES, conflicts
from tunesmith.recipe.schema import DEFAULT_ADAPTATION, DEFAULT_OBJECTIVE, Recipe
from tunesmith.suggestions import closest, did_you_mean

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from ruamel.yaml.nodes import Node

PARTS = {"objective": objectives, "adaptation": adaptations}
"""Keys of a recipe whose own keys depend on their ``type``."""

Model = typing.TypeVar("Model", bound=BaseModel)

Note = typing.Callable[[str], None]


def load(path: str | Path, overrides: Sequence[str] = (), note: Note = lambda line: None) -> Recipe:
    """Read a YAML recipe, apply dotted overrides (``train.learning_rate=1e-4``), and check it.

    ``note`` receives a line for each key of the recipe that an override replaces by an alternative.
    Raises RecipeError naming the file, the line, the key, what was expected and the nearest valid key.
    """
    raw, tree = read_file(path)
    return _check(raw, recipe_text.Text(str(path), tree, tuple(overrides)), note)


def read_file(path: str | Path) -> tuple[object, Node | None]:
    """Return the plain data of a YAML recipe and its tree, unchecked. Raises RecipeError."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(recipe_text.MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"recipe not found: {path}\n  Type `tunesmith init sft --out {path.name}` to make one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    return recipe_text.read(text, str(path))


def parse(
    raw: object,
    overrides: Sequence[str] = (),
    where: str = "recipe",
    note: Note = lambda line: None,
    tree: Node | None = None,
) -> Recipe:
    """Check plain data (a dict as YAML would return it; paths may be ``Path``). ``raw`` is not changed.

    ``tree``: the YAML tree that ``raw`` comes from, for line numbers in errors."""
    return _check(_without_paths(raw), recipe_text.Text(where, tree, tuple(overrides)), note)


def resolve(
    recipe: Recipe | JsonObject | str | Path, overrides: Sequence[str] = (), note: Note = lambda line: None
) -> Recipe:
    """Load or parse a recipe, and fill in the adaptation's default learning rate."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                f"overrides: expected none with a Recipe object, got {list(overrides)}. Pass a path or a mapping."
            )
        checked = recipe
    elif isinstance(recipe, dict):
        checked = parse(recipe, overrides, note=note)
    else:
        checked = load(recipe, overrides, note)
    if checked.train.learning_rate is not None:
        return checked
    rate = {"learning_rate": checked.default_learning_rate}
    return checked.model_copy(update={"train": checked.train.model_copy(update=rate)})


def _check(raw: object, text: recipe_text.Text, note: Note) -> Recipe:
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{text.name}: expected a mapping of keys such as `model:` and `data:`, got {type(raw).__name__}"
        )
    raw = {"objective": DEFAULT_OBJECTIVE, "adaptation": DEFAULT_ADAPTATION, **raw}
    for override in text.overrides:
        raw = recipe_text.apply(raw, override)
    for line in _drop_replaced(raw, text):
        note(line)
    text = replace(text, given=recipe_text.keys_of(raw))
    values, problems = dict(raw), []
    for part in PARTS:
        try:
            name, keys = _choose(part, values[part], text)
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


def _drop_replaced(raw: JsonObject, text: recipe_text.Text) -> list[str]:
    """Remove keys from ``raw`` if an override sets an alternative.

    Returns a line for each removed key that was not at its default. If overrides set several keys of one
    group, these stay, and ``conflicts`` refuses them."""
    lines = []
    for group in ALTERNATIVES:
        set_by = {key: text.override_in(key) for key in group}
        winners = [key for key in group if set_by[key] and _value_at(raw, key) is not None]
        for rival in (key for key in group if winners and not set_by[key]):
            *parts, name = rival.split(".")
            section = _value_at(raw, ".".join(parts))
            if isinstance(section, dict) and (value := section.pop(name, None)) is not None:
                default = next(model for model in _models_at(Recipe, parts)[0]).model_fields[name].default
                if value != default:
                    lines.append(f"{set_by[winners[0]]} replaces {rival}: {value} of {text.name}")
    return lines


def flag_advice(flag: str, value: str | None) -> str | None:
    """Return advice for ``--flag value`` on the command line of a recipe: an override or an option.

    None = neither tunesmith nor another program has a key with the name of the flag."""
    name = flag.lstrip("-").replace("-", "_")
    try:
        parsed = True if value is None else recipe_text.read(value, flag)[0]
    except RecipeError:  # a value that is not valid YAML is text
        parsed = value
    *_, last = name.split(".")
    places = [place for place in _places(last) if place.endswith(name)]
    if pointer := None if places else foreign_keys.find(last, parsed, {last: parsed}, lambda place: False):
        as_override = recipe_text.Text(flag, None, (f"{flag}=",))
        return f"{flag}: no such option. {_explain_foreign(pointer, (flag,), as_override)}"
    if not places:
        return None
    typed = " or ".join(shlex.quote(f"{place}={'VALUE' if value is None else value}") for place in places)
    return f"{flag}: no such option. A key of the recipe is typed without dashes: {typed}"


def _value_at(raw: object, key: str) -> object:
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _choose(part: str, value: object, text: recipe_text.Text) -> tuple[str, JsonObject]:
    """``lora`` or ``{type: lora, r: 8}`` -> ("lora", {"r": 8})."""
    names = PARTS[part].names()
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        expected = "expected a name or a mapping with `type`"
        raise RecipeError(f"{text.at((part,))}: `{part}`: {expected}, got {value!r}")
    keys = dict(value)
    if "type" not in keys:
        if slip := _mistyped_type(keys):
            raise RecipeError(f"{text.at((part, slip))}: unknown key `{part}.{slip}`. Did you mean `type`?")
        raise RecipeError(f"{text.at((part,))}: the key `{part}.type` is missing. Valid: {', '.join(names)}")
    name = keys.pop("type")
    if name not in names:
        raise RecipeError(
            f"{text.at((part, 'type'))}: `{part}`: unknown type {name!r}. "
            + (_typed_here((part,), name, text) or did_you_mean(str(name), names))
        )
    return str(name), keys


def _build(
    model: type[Model], values: JsonObject, text: recipe_text.Text, prefix: tuple[str, ...] = ()
) -> Model:
    """Make a ``model`` of ``values`` without converting any (the text "8" is no number, true is not 1)."""
    try:
        return model.model_validate(values, strict=True, context={"folder": text.folder})
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, error.errors(), text, prefix))) from None


def _explain(
    model: type[BaseModel], errors: Sequence[ErrorDetails], text: recipe_text.Text, prefix: tuple[str, ...]
) -> list[str]:
    """A line for each key that is wrong."""
    unknown_in = {error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden"}
    lines: list[str] = []
    expected: dict[tuple[str, str, str, str], list[str]] = {}
    for error in errors:
        *parts, last = error["loc"] or ("",)
        is_key = error["type"] == "extra_forbidden"
        path = (*_key_path(model, tuple(parts)), last) if is_key else _key_path(model, error["loc"])
        key, where = ".".join(map(str, (*prefix, *path))), text.at((*prefix, *path))
        if error["type"] in ("extra_forbidden", "invalid_key"):
            lines.append(f"{where}: {_explain_unknown(model, key, error, text, prefix)}")
        elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            kinds = [str(one.model_fields["type"].default) for one in _models_at(model, path)[0]]
            lines.append(f"{where}: {_explain_type(key, error, kinds)}")
        elif error["type"] == "missing":
            if error["loc"][:-1] not in unknown_in:  # else the unknown key is probably this one, mistyped
                lines.append(f"{where}: the key `{key}` is missing")
        elif error["type"] == "value_error":
            message = f"{where}: {key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}"
            lines.append(_end_sentence(message, _typed_here((*prefix, *path), error["input"], text)))
        else:
            wanted = error["msg"].removeprefix("Input should be ")
            advice = _typed_here((*prefix, *path), error["input"], text)
            expected.setdefault((where, key, repr(error["input"]), advice), []).append(wanted)
    lines += [
        _end_sentence(f"{where}: `{key}`: expected {' or '.join(wanted)}, got {got}", advice)
        for (where, key, got, advice), wanted in expected.items()
    ]
    return lines


def _explain_type(key: str, error: ErrorDetails, kinds: Sequence[str]) -> str:
    """Return the message for an item of a list whose ``type`` is missing, or none of ``kinds``."""
    if error["type"] == "union_tag_not_found":
        if slip := _mistyped_type(error["input"]):
            return f"unknown key `{key}.{slip}`. Did you mean `type`?"
        return f"the key `{key}.type` is missing. Valid: {', '.join(kinds)}"
    name = str(error["ctx"]["tag"])
    return f"`{key}.type`: unknown type {name!r}. {did_you_mean(name, kinds)}"


def _mistyped_type(item: Mapping[object, object]) -> str | None:
    """Return the key of ``item`` that looks like ``type``."""
    return next((str(key) for key in item if closest(str(key), ["type"])), None)


def _end_sentence(message: str, advice: str) -> str:
    """Append ``advice`` to a message, in place of its suggestion of the nearest name."""
    return f"{message.partition('. Did you mean')[0]}. {advice}" if advice else message


def _typed_here(path: Sequence[str | int], value: object, text: recipe_text.Text) -> str:
    """Return ``Type train.packing: auto`` for a value in another program's form; "" for any other value.

    ``{stage: NAME}`` gets an advice of its own: it belongs into the file of a pipeline."""
    if isinstance(value, dict) and set(value) == {"stage"}:
        return "only `tunesmith pipeline` knows stages; here name a model or a run folder"
    key, here = foreign_values.value_here(".".join(map(str, path)), value)
    if here is None:
        return ""
    if isinstance(here, foreign_values.Unset):
        return "Leave the key out"
    return f"Type {text.setting(path, key, here)}"


def _explain_unknown(
    model: type[BaseModel], key: str, error: ErrorDetails, text: recipe_text.Text, prefix: tuple[str, ...]
) -> str:
    """Return ``unknown key `train.epoch`. Did you mean ...``.

    For a key of another program it suggests the translation; for a key of another ``type``, that type."""
    path = error["loc"]
    name, valid = str(path[-1]), _names_of(_models_at(model, path[:-1])[0])
    if prefix and any(isinstance(part, int) for part in path):  # a reward: only its own keys help
        return f"unknown key `{key}`. {did_you_mean(name, valid)}"
    pointer = foreign_keys.find(name, error["input"], text.given, lambda place: _is_here(text.given, place))
    if pointer and name.removesuffix("s") not in valid:  # `betas` next to `beta` is a slip
        return f"unknown key `{key}`. {_explain_foreign(pointer, (*prefix, *path), text)}"
    if prefix and len(path) == 1:
        part, valid = prefix[0], [*valid, "type"]
        if owners := _owners(part, name):
            return f"`{key}` belongs to {owners}. Choose that, or leave the key out. Valid here: {', '.join(sorted(valid))}"
    return f"unknown key `{key}`. {did_you_mean(name, valid, _places(name))}"


def _explain_foreign(pointer: foreign_keys.Pointer, path: Sequence[str | int], text: recipe_text.Text) -> str:
    """Return ``Here it is `adaptation.r: 8` ``, with the types that have the key if the recipe's lacks it."""
    place, value, note = pointer.place, pointer.value, f" ({pointer.note})" if pointer.note else ""
    if place is None or isinstance(value, foreign_values.Unset):
        return f"Leave it out: {pointer.note or 'that is what happens here'}"
    if place.startswith("--"):
        typed = place if value in (None, True) else f"{place} {shlex.quote(str(value))}"
        return f"Here it is `{typed}`{note}"
    if not _is_here(text.given, place):
        note = f" with {_owners(*place.split('.', 1))}{note}"
    return f"Here it is `{place if value is None else text.setting(path, place, value)}`{note}"


def _is_here(given: foreign_values.Given, place: str) -> bool:
    """Return False for a key that another objective or adaptation has, and not the recipe's."""
    part, _, rest = place.partition(".")
    chosen = given.get(part, {"objective": DEFAULT_OBJECTIVE, "adaptation": DEFAULT_ADAPTATION}.get(part))
    chosen = chosen.get("type") if isinstance(chosen, dict) else chosen
    keys = _configs(part).get(str(chosen)) if rest and part in PARTS else None
    return keys is None or rest in keys.model_fields


def _owners(part: str, key: str) -> str:
    """Return the types of "objective" or "adaptation" that have this key; "" for none."""
    kinds = [kind for kind, keys in _configs(part).items() if key in keys.model_fields]
    return " or ".join(f"`{part}.type: {kind}`" for kind in kinds)


def _configs(part: str) -> dict[str, type[BaseModel]]:
    """The ``Config`` of each type of "objective" or "adaptation"."""
    return {kind: PARTS[part].module(kind).Config for kind in PARTS[part].names()}


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
    kept: tuple[str | int, ...] = ()
    for length, part in enumerate(path):
        candidates, is_name = _models_at(model, path[:length])
        if isinstance(part, int) or is_name or part in _names_of(candidates):
            kept = (*kept, part)
        elif not _of_type(candidates, part):
            break
    return kept


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
        if chosen := _of_type(candidates, part):  # pydantic names the branch of a union by its type
            candidates = chosen
            continue
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        candidates = [inner for field in fields for inner in _models_in(field.annotation)]
        is_name = bool(candidates) and any(dict in _origins(field.annotation) for field in fields)
    return candidates, is_name


def _of_type(candidates: Sequence[type[BaseModel]], name: str | int) -> list[type[BaseModel]]:
    """Return the models whose key ``type`` is ``name``."""
    return [
        one for one in candidates if "type" in one.model_fields and one.model_fields["type"].default == name
    ]


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
