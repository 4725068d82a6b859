"""The file of a pipeline: its stages, each with a checked recipe, in the order in which they run.

A recipe names the result of an earlier stage as ``{stage: NAME}`` wherever it names a model. Here the mapping
becomes the path of that stage's run folder, so a stage trains like any run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith import objectives
from tunesmith import recipe as recipes
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.objectives import Traits
from tunesmith.recipe import Recipe
from tunesmith.recipe import text as recipe_text
from tunesmith.suggestions import did_you_mean

KEYS, STAGE_KEYS, COMPARE_KEYS = (
    ("stages", "compare"),
    ("recipe", "overrides"),
    ("prompts", "count", "max_new_tokens"),
)
RESERVED = ("manifests", "replaced")
"""Folders of a pipeline that hold no run."""

STAGE = "stage"
"""The only key of a mapping that names the result of a stage."""


@dataclass(frozen=True)
class Stage:
    """One training run. ``folder``: its run folder. ``source``: the recipe file, or ``inline``.

    ``where``: file and line of the stage. ``inputs``: key of the recipe -> the stage whose result it names.
    """

    name: str
    folder: Path
    recipe: Recipe
    source: str
    where: str
    inputs: Mapping[str, str]

    @property
    def traits(self) -> Traits:
        traits: Traits = objectives.module(objectives.name_of(self.recipe.objective)).Objective.traits
        return traits

    @property
    def writes(self) -> bool:
        """True if its model generates text."""
        return self.traits.head == "lm"

    def resolved(self) -> JsonObject:
        """The recipe as plain data, with the inputs as ``{stage: NAME}``, so that the folder may move."""
        flat = self.recipe.resolved()
        for key, name in self.inputs.items():
            flat = _with_value(flat, key.split("."), {STAGE: name})
        return flat


@dataclass(frozen=True)
class Comparison:
    """Prompts that every stage's model answers: ``prompts``, or ``count`` held-out ones."""

    prompts: tuple[str, ...] = ()
    count: int = 4
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Pipeline:
    """``folder`` holds a run folder for each stage, and the summary."""

    file: Path
    folder: Path
    stages: tuple[Stage, ...]
    comparison: Comparison

    def stage(self, name: str) -> Stage:
        """Return the stage of that name. Raises RecipeError."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            names = [stage.name for stage in self.stages]
            raise RecipeError(f"{self.file} has no stage {name!r}. {did_you_mean(name, names)}")
        return found


def read(file: str | Path, folder: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline and the recipes of all its stages; paths of recipes are relative to ``file``.

    ``overrides``: ``STAGE.KEY=VALUE`` strings. Raises RecipeError with every problem of every stage.
    """
    file = Path(file)
    if not file.exists():
        raise RecipeError(f"pipeline not found: {file}\n  docs/pipeline.md shows one.")
    raw, tree = recipes.read_file(file)
    text = recipe_text.Text(str(file), tree)
    _check_keys(raw, (), KEYS, text)
    assert isinstance(raw, dict)
    given = raw.get("stages")
    if not isinstance(given, dict) or not given:
        raise RecipeError(
            f"{text.at(('stages',))}: `stages`: expected a mapping from a name to `recipe` and `overrides`, got {given!r}"
        )
    typed = _by_stage(overrides, list(given))
    problems, stages = [], []
    for name in given:
        try:
            names = [stage for stage in given if isinstance(stage, str)]
            stages.append(_read_stage(str(name), given[name], names, folder, text, typed.get(str(name), [])))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return Pipeline(file, folder, tuple(stages), _read_comparison(raw.get("compare"), text))


def _by_stage(overrides: Sequence[str], names: Sequence[object]) -> dict[str, list[str]]:
    """Return the overrides of each stage, without its name."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or "=" in name or name not in names:
            raise RecipeError(
                f"override {override!r}: expected STAGE.KEY=VALUE with one of the stages {', '.join(map(str, names))}, "
                f"for example {names[0]}.train.epochs=2"
            )
        found.setdefault(name, []).append(rest)
    return found


def _read_stage(
    name: str, given: object, names: Sequence[str], folder: Path, text: recipe_text.Text, typed: Sequence[str]
) -> Stage:
    path = ("stages", name)
    where = text.at(path)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED:
        raise RecipeError(
            f"{where}: a stage is a folder: expected a name of letters, digits, - and _ other than "
            f"{' and '.join(RESERVED)}, got {name!r}"
        )
    _check_keys(given, path, STAGE_KEYS, text)
    assert isinstance(given, dict)
    recipe, overrides = given.get("recipe"), given.get("overrides") or {}
    if not isinstance(recipe, str | dict):
        raise RecipeError(
            f"{text.at((*path, 'recipe'))}: `recipe`: expected the path of a recipe, or the recipe itself, got {recipe!r}"
        )
    if not isinstance(overrides, dict):
        raise RecipeError(
            f"{text.at((*path, 'overrides'))}: `overrides`: expected a mapping such as {{train.epochs: 2}}, got {overrides!r}"
        )
    known = _Stages(names[: names.index(name)], names, folder)
    try:
        raw: object = recipe
        source, tree = "inline", recipe_text.find(text.tree, (*path, "recipe"))
        if isinstance(recipe, str):
            file = Path(text.name).parent / recipe
            source, (raw, tree) = str(file), recipes.read_file(file)
        origin = recipe_text.Text(text.name if source == "inline" else source, tree)
        keys = [
            f"{key}={recipe_text.dump(known.fill(value, (*path, 'overrides', key), text), one_line=True).strip()}"
            for key, value in overrides.items()
        ]
        checked = recipes.parse(
            known.fill(raw, (), origin), [*keys, *map(known.fill_override, typed)], origin.name, tree=tree
        )
    except RecipeError as error:
        raise RecipeError(f"{where}: stage {name}: {error}") from None
    checked = recipes.resolve(checked)
    return Stage(name, folder / name, checked, source, where, known.inputs_of(checked))


@dataclass(frozen=True)
class _Stages:
    """The stages ``before`` one, which it may name, and ``all`` stages."""

    before: Sequence[str]
    all: Sequence[str]
    folder: Path

    def fill(self, value: object, path: tuple[str | int, ...], text: recipe_text.Text) -> object:
        """Return plain data with the run folder of the stage for every ``{stage: NAME}`` outside ``data``."""
        if isinstance(value, list):
            return [self.fill(item, (*path, index), text) for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if set(value) == {STAGE}:
            return self._path(value[STAGE], text.at(path))
        return {
            key: item if (key, path) == ("data", ()) else self.fill(item, (*path, key), text)
            for key, item in value.items()
        }

    def fill_override(self, override: str) -> str:
        """Return ``KEY=VALUE`` with the run folder of the stage for every ``{stage: NAME}``."""
        key, equals, value = override.partition("=")
        if "{" not in value:
            return override
        where = f"override {override!r}"
        filled = self.fill(recipe_text.read(value, where)[0], (key,), recipe_text.Text(where))
        return f"{key}{equals}{recipe_text.dump(filled, one_line=True).strip()}"

    def _path(self, name: object, where: str) -> str:
        if name not in self.before:
            listed = ", ".join(self.before) or "none"
            reason = "runs later" if name in self.all else "is no stage"
            move = " Move it up, above this stage." if name in self.all else ""
            raise RecipeError(
                f"{where}: {{stage: {name}}}: {name} {reason}; a stage may name an earlier one: {listed}.{move}"
            )
        return str(self.folder / str(name))

    def inputs_of(self, recipe: Recipe) -> dict[str, str]:
        folders = {str(self.folder / name): name for name in self.before}
        return {
            key: folders[value]
            for key, value in _strings(recipe.resolved())
            if value in folders and not key.startswith("data.")
        }


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every text in nested plain data."""
    if isinstance(value, str):
        yield key, value
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for part, item in items:
        yield from _strings(item, f"{key}.{part}" if key else str(part))


def _with_value(tree: JsonObject, parts: Sequence[str], value: object) -> JsonObject:
    """Return a copy of nested plain data with ``value`` at the key ``parts``."""

    def put(node: object, rest: Sequence[str]) -> object:
        if not rest:
            return value
        if isinstance(node, list):
            return [put(item, rest[1:]) if str(at) == rest[0] else item for at, item in enumerate(node)]
        assert isinstance(node, dict)
        return {**node, rest[0]: put(node[rest[0]], rest[1:])}

    filled = put(tree, parts)
    assert isinstance(filled, dict)
    return filled


def _read_comparison(given: object, text: recipe_text.Text) -> Comparison:
    if given is None:
        return Comparison()
    _check_keys(given, ("compare",), COMPARE_KEYS, text)
    assert isinstance(given, dict)
    prompts, count = given.get("prompts", ()), given.get("count", Comparison.count)
    length = given.get("max_new_tokens", Comparison.max_new_tokens)
    checks = (
        ("prompts", "a list of texts", all(isinstance(one, str) and one.strip() for one in prompts)
         if isinstance(prompts, list | tuple) else False, prompts),
        ("count", "a number of prompts, 0 = no comparison", type(count) is int and count >= 0, count),
        ("max_new_tokens", "a number of tokens above 0", type(length) is int and length > 0, length),
    )  # fmt: skip
    for key, expected, is_right, value in checks:
        if not is_right:
            raise RecipeError(
                f"{text.at(('compare', key))}: `compare.{key}`: expected {expected}, got {value!r}"
            )
    if prompts and "count" in given:
        raise RecipeError(f"{text.at(('compare', 'count'))}: set compare.prompts or compare.count, not both")
    return Comparison(tuple(prompts), count, length)


def _check_keys(value: object, path: tuple[str, ...], valid: Sequence[str], text: recipe_text.Text) -> None:
    """Raise RecipeError unless ``value`` is a mapping whose keys are all ``valid``."""
    name = ".".join(path)
    if not isinstance(value, dict):
        what = f"`{name}`: " if name else ""
        raise RecipeError(f"{text.at(path)}: {what}expected a mapping with {', '.join(valid)}, got {value!r}")
    for key in value:
        if key not in valid:
            full = f"{name}.{key}" if name else str(key)
            raise RecipeError(
                f"{text.at((*path, key))}: unknown key `{full}`. {did_you_mean(str(key), valid)}"
            )
