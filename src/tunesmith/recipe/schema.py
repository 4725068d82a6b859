"""The recipe: what a run is, as YAML, strictly checked.

Each part's keys live beside what they configure (``data/config.py``, ``train/config.py``, every objective and adaptation
file); this module only nests them, names the nearest valid key when one is unknown, and refuses choices that do not go
together or would do nothing.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tunesmith import adaptations, objectives
from tunesmith.data.config import DataConfig, Source, idle
from tunesmith.data.read.source import eval_sources
from tunesmith.data.rows import Chat, Labelled, Ranking
from tunesmith.errors import RecipeError
from tunesmith.nearest import did_you_mean, nearest
from tunesmith.recipe import text as recipe_text
from tunesmith.train.config import SampleConfig, TrainConfig


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recipe(Strict):
    """A whole run. ``objective`` and ``adaptation`` hold the ``Config`` of the chosen file."""

    model: str = Field(description="catalog name, folder, run folder or adapter folder")
    adapter: Literal["continue", "merge", "new"] | None = Field(
        None, description="when `model` is an adapter: train it on, fold it into its base first, or leave it and start anew"
    )
    add_tokens: list[str] = Field(default_factory=list, description="new tokens such as [<tool>], one id each")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="where transformers puts the layers: auto, cpu, cuda:0 or a mapping; default: all on the run's device"
    )
    trust_remote_code: bool = Field(False, description="run the Python files that came with the model, in this run only")
    objective: Any = Field(description="what the loss is")
    adaptation: Any = Field(description="which weights are trained")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    samples: SampleConfig = SampleConfig()
    seed: int = Field(0, ge=0, lt=2**32, description="of row order, dropout and new weights")

    @field_validator("add_tokens")
    @classmethod
    def _each_token_once(cls, tokens: list[str]) -> list[str]:
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice or any(not token.strip() for token in tokens):
            raise ValueError(f"{twice[0]!r} stands there twice" if twice else "a token of spaces, or of nothing, cannot be added")
        return tokens

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, every default filled in; ``recipe.yaml`` of the run folder holds this."""
        out = self.model_dump(mode="json")
        out["objective"] = {"type": objectives.name_of(self.objective), **self.objective.model_dump(mode="json")}
        out["adaptation"] = {"type": adaptations.name_of(self.adaptation), **self.adaptation.model_dump(mode="json")}
        return out


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides (``train.learning_rate=1e-4``), and check it.

    Raises RecipeError naming the file, the line, the key, what was expected and the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe not found: {path}\n  Type `tunesmith init sft --out {path.name}` to make one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    raw, tree = recipe_text.read(text, str(path))
    return _check(raw, recipe_text.Text(str(path), tree, tuple(overrides)))


def parse(raw: Any, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Check plain data (a dict as YAML would give it; paths may be ``Path``). ``raw`` is not changed."""
    return _check(_without_paths(raw), recipe_text.Text(where, None, tuple(overrides)))


def _check(raw: Any, text: recipe_text.Text) -> Recipe:
    if not isinstance(raw, dict):
        raise RecipeError(f"{text.name}: expected a mapping of keys such as `model:` and `data:`, got {type(raw).__name__}")
    for override in text.overrides:
        raw = recipe_text.apply(raw, override)
    raw, problems = dict(raw), []
    for part, package, default in (("objective", objectives, "sft"), ("adaptation", adaptations, "lora")):
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


def conflicts(recipe: Recipe) -> list[str]:
    """Choices that contradict each other, and keys that would do nothing beside the others. Default values never count."""
    data, train, samples = recipe.data, recipe.train, recipe.samples
    held_out = bool(eval_sources(data)) or data.eval.fraction > 0
    objective = objectives.name_of(recipe.objective)
    rows = objectives.module(objective).Objective.rows
    found = []

    def clash(condition: Any, message: str) -> None:
        if condition:
            found.append(message)

    clash(
        recipe.add_tokens and recipe.adapter == "continue",
        "add_tokens: adapter: continue keeps the adapter's own vocabulary. Use adapter: merge, which makes room for new tokens",
    )
    clash(
        recipe.device_map is not None and recipe.adapter,
        "device_map: peft places the layers anew when it attaches an adapter. Fold it in first: tunesmith merge",
    )
    clash(
        recipe.device_map is not None and train.torch_compile,
        "device_map: the hooks that bring batches to its layers cannot be compiled. Leave out one of the two",
    )
    clash(
        train.torch_compile and getattr(recipe.adaptation, "lora_dropout", 0),
        "adaptation.lora_dropout: it is drawn on the host for each row, and a layer compiled by train.torch_compile cannot ask "
        "the host. Leave out one of the two",
    )
    clash(
        getattr(recipe.adaptation, "use_dora", False) and getattr(recipe.adaptation, "init_lora_weights", True) is not True,
        "adaptation.use_dora: its magnitudes are measured on a LoRA that starts at zero, so init_lora_weights must be left out",
    )
    clash(
        recipe.trust_remote_code and recipe.add_tokens,
        "add_tokens: how the vocabulary of a model with code of its own grows is up to that code. Leave out one of the two",
    )
    if objectives.module(objective).Objective.head != "lm":
        for key in ("prompts", "count", "max_new_tokens"):
            clash(changed(samples, key), f"samples.{key} does nothing: a model of {objective} writes no text")
    judged = Ranking in rows
    clash(
        changed(data, "max_unlearnable") and (judged or objectives.module(objective).Objective.head != "lm"),
        f"data.max_unlearnable does nothing: there is something to learn in every row of {objective}",
    )
    for part, key in (("adaptation", "lora_dropout"), ("adaptation", "dropout"), ("train", "neftune_noise_alpha")):
        clash(
            judged and getattr(getattr(recipe, part), key, 0),
            f"{part}.{key}: {objective} compares what the weights say, and nothing may be drawn in it. Leave it out",
        )
    learns = f"{objective} learns from {', '.join(row.__name__ for row in rows)} rows"
    clash(data.template and Chat not in rows and not judged, f"data.template does nothing: {learns}")
    sources = {f"data.train.{place}": source for place, source in enumerate(data.train)}
    sources |= {f"data.eval.sets.{name}": source for name, source in (data.eval.sets or {}).items()}
    for place, source in sources.items():
        for key in idle(source):
            clash(True, f"{place}.{key} does nothing: {source.path} is no data set of the Hub (path: hub:OWNER/NAME)")
        clash(source.separator and Labelled not in rows, f"{place}.separator does nothing: {learns}")
        clash(
            source.separator and getattr(recipe.objective, "label_smoothing", 0),
            f"{place}.separator stands between several labels; objective.label_smoothing goes with one. Leave out one of the two",
        )
    clash(
        not data.cache and any(source.streaming for source in sources.values()),
        "data.cache=false: a stream is read once and kept encoded, so that a run can be resumed. Leave out one of the two",
    )
    given = [key for key in ("path", "sets", "fraction") if changed(data.eval, key)]
    clash(len(given) > 1, f"set {' or '.join(f'data.eval.{key}' for key in given)}, not both")
    clash(data.eval.limit and data.eval.sets, "data.eval.limit does nothing beside data.eval.sets: give each set its own limit")
    for name, source in (data.eval.sets or {}).items():
        clash(changed(source, "weight"), f"data.eval.sets.{name}.weight does nothing: every held-out row is read once")
    clash(data.eval.limit and not held_out, "data.eval.limit does nothing: no row is held out (data.eval.fraction is 0)")
    clash(
        train.early_stopping_patience and not held_out,
        "train.early_stopping_patience needs held-out rows: give data.eval.fraction, data.eval.path or data.eval.sets",
    )
    clash(
        train.eval_steps not in (None, "epoch") and not held_out,
        "train.eval_steps does nothing: no row is held out (data.eval.fraction is 0)",
    )
    clash(
        train.early_stopping_threshold and not train.early_stopping_patience,
        "train.early_stopping_threshold does nothing without train.early_stopping_patience",
    )
    clash(
        train.max_steps and changed(train, "epochs"),
        "set train.max_steps or train.epochs, not both; train.epochs=1 beside max_steps takes back what the recipe says",
    )
    clash(
        train.scheduler_name == "constant" and (train.warmup_ratio or train.warmup_steps),
        "train.lr_scheduler_type: constant has no warm-up; use constant_with_warmup",
    )
    for key in ("dampening", "nesterov"):
        clash(
            train.optim_name == "sgd" and train.optim_args.get(key) and not train.optim_args.get("momentum"),
            f"train.optim.{key} does nothing without train.optim.momentum",
        )
    clash(samples.prompts and changed(samples, "count"), "set samples.prompts or samples.count, not both")
    clash(
        samples.count == 0 and not samples.prompts and changed(samples, "max_new_tokens"),
        "samples.max_new_tokens does nothing: samples.count is 0",
    )
    return found


def brief(recipe: Recipe) -> str:
    """What the run is, a line for each part: the keys that matter in every run, and whatever is not at its default."""
    objective, adaptation = objectives.name_of(recipe.objective), adaptations.name_of(recipe.adaptation)
    rate = recipe.train.learning_rate or adaptations.module(adaptation).Adaptation.learning_rate
    length = "max_steps" if recipe.train.max_steps else "epochs"
    held_out = recipe.data.eval
    tested = [f"{name}: {_source(source)}" for name, source in (held_out.sets or {}).items()]
    parts = {
        "model": [
            recipe.model,
            *_shown(recipe, ("seed",), hidden=("model", "objective", "adaptation", "data", "train", "samples")),
        ],
        "objective": [objective, *_shown(recipe.objective, tuple(type(recipe.objective).model_fields))],
        "adaptation": [adaptation, *_shown(recipe.adaptation, tuple(type(recipe.adaptation).model_fields))],
        "data": [", ".join(map(_source, recipe.data.train)), *_shown(recipe.data, hidden=("train", "eval"))],
        "eval": tested or _shown(held_out, ("path" if held_out.path else "fraction",)),
        "train": [
            f"learning_rate {rate:g}",
            *_shown(recipe.train, (length, "batch_size", "lr_scheduler_type"), ("learning_rate",)),
        ],
    }
    return "\n".join(f"{name:<11} {'  '.join(words)}" for name, words in parts.items())


def _source(source: Source) -> str:
    return " ".join([source.path, *_shown(source, hidden=("path",))])


def _shown(config: BaseModel, always: tuple[str, ...] = (), hidden: tuple[str, ...] = ()) -> list[str]:
    """``["r 8", "lora_alpha 16"]``: the keys of ``always``, then those not at their defaults; empty ones are left out."""
    keys = dict.fromkeys([*always, *(key for key in type(config).model_fields if key not in hidden and changed(config, key))])
    values = {key: getattr(config, key) for key in keys}
    return [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items() if value is not None
    ]


def changed(config: BaseModel, key: str) -> bool:
    """Whether a key differs from its default."""
    return bool(getattr(config, key) != type(config).model_fields[key].get_default(call_default_factory=True))


def _choose(part: str, value: Any, names: list[str], text: recipe_text.Text) -> tuple[str, dict[str, Any]]:
    """``lora`` or ``{type: lora, r: 8}`` -> ("lora", {"r": 8})."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        raise RecipeError(f"{text.at((part,))}: `{part}`: expected a name or a mapping with `type`, got {value!r}")
    keys = dict(value)
    if "type" not in keys:
        meant = next((str(key) for key in keys if nearest(str(key), ["type"])), None)
        if meant is not None:
            raise RecipeError(f"{text.at((part, meant))}: unknown key `{part}.{meant}`. Did you mean `type`?")
        raise RecipeError(f"{text.at((part,))}: the key `{part}.type` is missing. Valid: {', '.join(names)}")
    name = keys.pop("type")
    if name not in names:
        raise RecipeError(f"{text.at((part, 'type'))}: `{part}`: unknown type {name!r}. {did_you_mean(str(name), names)}")
    return str(name), keys


def _build(model: type[BaseModel], values: dict[str, Any], text: recipe_text.Text, prefix: tuple[str, ...] = ()) -> Any:
    """``values`` as ``model``; nothing is coerced (the text "8" is no number, true is not 1)."""
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, error.errors(), text, prefix))) from None


def _explain(model: type[BaseModel], errors: Sequence[Any], text: recipe_text.Text, prefix: tuple[str, ...]) -> list[str]:
    """One line for each key that is wrong."""
    unknown_in = {error["loc"][:-1] for error in errors if error["type"] == "extra_forbidden"}
    lines: list[str] = []
    expected: dict[tuple[str, str, str], list[str]] = {}
    for error in errors:
        loc = _key_path(model, error["loc"]) if error["type"] != "extra_forbidden" else error["loc"]
        key, where = ".".join(map(str, (*prefix, *loc))), text.at((*prefix, *loc))
        if error["type"] in ("extra_forbidden", "invalid_key"):
            valid = [*_keys_at(model, error["loc"][:-1]), *(["type"] if prefix and len(error["loc"]) == 1 else [])]
            name = str(error["loc"][-1])
            owners = _owners(prefix[0], name) if prefix and len(error["loc"]) == 1 else []
            if owners:
                kinds = " or ".join(f"`{prefix[0]}.type: {owner}`" for owner in owners)
                here = ", ".join(sorted(valid))
                lines.append(f"{where}: `{key}` belongs to {kinds}. Choose that, or leave the key out. Valid here: {here}")
            else:
                elsewhere = [HELD_BY[name]] if name in HELD_BY else _places(name)
                lines.append(f"{where}: unknown key `{key}`. {did_you_mean(name, valid, elsewhere)}")
        elif error["type"] == "missing":
            if error["loc"][:-1] not in unknown_in:  # else the unknown key is the missing one, mistyped
                lines.append(f"{where}: the key `{key}` is missing")
        elif error["type"] == "value_error":
            lines.append(f"{where}: {key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}")
        else:
            wanted = error["msg"].removeprefix("Input should be ")
            expected.setdefault((where, key, repr(error["input"])), []).append(wanted)
    lines += [f"{where}: `{key}`: expected {' or '.join(wanted)}, got {got}" for (where, key, got), wanted in expected.items()]
    return lines


HELD_BY = {
    "rank_pattern": "adaptation.r: {default: 8, PATTERN: 16}",
    "alpha_pattern": "adaptation.lora_alpha: {default: 16, PATTERN: 32}",
}
"""Keys of peft's whose values stand in another key here."""

PARTS = {"objective": objectives, "adaptation": adaptations}
"""Keys of a recipe whose own keys depend on their ``type``."""


def _owners(part: str, name: str) -> list[str]:
    """The types of "objective" or "adaptation" that have a key of this name: ("adaptation", "r") -> ["lora"]."""
    return [kind for kind in PARTS[part].names() if name in PARTS[part].module(kind).Config.model_fields]


def _places(name: str) -> list[str]:
    """Where a key of this name may stand in a recipe: ``max_length`` -> ``train.max_length``."""
    parts: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for part, package in PARTS.items():
        parts += [(f"{part}.", package.module(choice).Config) for choice in package.names()]
    found = []
    for prefix, model in parts:  # grows while it is read
        found += [prefix + name] if name in model.model_fields else []
        for key, field in model.model_fields.items():
            step = ".NAME." if dict in _origins(field.annotation) else ".0." if list in _origins(field.annotation) else "."
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
