"""The recipe: what a run is, as YAML, strictly checked.

Each part's keys live beside what they configure (``data/config.py``, ``engine/config.py``, every objective and adaptation
file); this module only nests them, reads YAML safely, applies ``key=value`` overrides and names the nearest valid key when
one is unknown.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith import adaptations, objectives
from tunesmith.data.config import DataConfig
from tunesmith.engine.config import SampleConfig, TrainConfig
from tunesmith.errors import RecipeError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Strict):
    """A whole run. ``objective`` and ``adaptation`` hold the ``Config`` of the chosen file."""

    model: str = Field(description="catalog name, folder, run folder or adapter folder")
    adapter: Literal["continue", "merge", "new"] | None = Field(
        None, description="when `model` is an adapter: train it on, fold it into its base first, or leave it and start anew"
    )
    objective: Any = Field(description="what the loss is")
    adaptation: Any = Field(description="which weights are trained")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    samples: SampleConfig = SampleConfig()
    seed: int = Field(0, ge=0, lt=2**32)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, every default filled in; ``recipe.yaml`` of the run folder holds this."""
        out = self.model_dump(mode="json")
        out["objective"] = {"type": objectives.name_of(self.objective), **self.objective.model_dump(mode="json")}
        out["adaptation"] = {"type": adaptations.name_of(self.adaptation), **self.adaptation.model_dump(mode="json")}
        return out


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides (``train.learning_rate=1e-4``), and check it.

    Raises RecipeError naming the file, the key, what was expected and the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe not found: {path}\n  Type `tunesmith init sft > {path.name}` to make one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    return parse(_safe_yaml(text, str(path)), overrides, where=str(path))


def parse(raw: Any, overrides: list[str] | tuple[str, ...] = (), where: str = "recipe") -> Recipe:
    """Check plain data against the schema. ``raw`` is what YAML gave; it is not changed."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping of keys such as `model:` and `data:`, got {type(raw).__name__}")
    raw = {key: value for key, value in raw.items()}
    for override in overrides:
        raw = _apply(raw, override)
    try:
        objective_type, objective = _choose("objective", raw.get("objective", "sft"), objectives.names(), where)
        adaptation_type, adaptation = _choose("adaptation", raw.get("adaptation", "lora"), adaptations.names(), where)
        raw["objective"] = _build(objectives.module(objective_type).Config, objective, f"{where}: objective")
        raw["adaptation"] = _build(adaptations.module(adaptation_type).Config, adaptation, f"{where}: adaptation")
        return _build(Recipe, raw, where)
    except RecipeError:
        raise


def _safe_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{where}, line {line}: {error.problem}. A recipe holds plain values only; remove the tag.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def _apply(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """Set one dotted key. The value is YAML, so lists and mappings work."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value, for example train.epochs=2")
    raw = dict(raw)
    node = raw
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str) and parent in ("objective", "adaptation"):
            child = {"type": child}
        if child is not None and not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {parent} is not a mapping")
        node[parent] = dict(child or {})
        node = node[parent]
    node[last] = _safe_yaml(value, f"override {override!r}")
    return raw


def _choose(part: str, value: Any, names: list[str], where: str) -> tuple[str, dict[str, Any]]:
    """``lora`` or ``{type: lora, r: 8}`` -> ("lora", {"r": 8})."""
    keys = {"type": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = keys.pop("type", None)
    if name not in names:
        raise RecipeError(f"{where}: {part}: unknown type {name!r}. {_nearest(str(name), names)}")
    return str(name), keys


def _build(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, item, where) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key `{path}`. {_nearest(str(item['loc'][-1]), _keys_at(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{where}: the key `{path}` is missing"
    return f"{where}: `{path}`: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return (f"Did you mean `{close[0]}`? " if close else "") + "Valid: " + ", ".join(sorted(valid))


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The field names valid at ``loc`` inside ``model`` (list positions and union branches are stepped over)."""
    candidates: list[type[BaseModel]] = [model]
    for part in loc:
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        if fields:
            candidates = [inner for field in fields for inner in _models_in(field.annotation)]
    return [name for candidate in candidates for name in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list, tuple, typing.Annotated):
        return [inner for arg in typing.get_args(annotation) for inner in _models_in(arg)]
    return []
