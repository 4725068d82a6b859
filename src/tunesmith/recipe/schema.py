"""The keys of a recipe.

The keys of each part are next to what they configure (``data/data_config.py``, ``train/train_config.py``,
every objective and adaptation file); this module only nests them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tunesmith import adaptations, objectives
from tunesmith.data.data_config import DataConfig, GenerateConfig, Source
from tunesmith.data.read.source import eval_sources
from tunesmith.json_types import JsonObject
from tunesmith.metrics import tasks
from tunesmith.metrics.tasks import Task
from tunesmith.train.train_config import SampleConfig, TrainConfig

DEFAULT_OBJECTIVE = "sft"
DEFAULT_ADAPTATION = "lora"
"""Used where a recipe names none."""


class Recipe(BaseModel):
    """A whole run. ``objective`` and ``adaptation`` hold the ``Config`` of the chosen file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(description="catalog name, folder, run folder or adapter folder")
    adapter: Literal["continue", "merge", "new"] | None = Field(
        None,
        description="when `model` is an adapter: train it further, merge it into its base first, or train a new one",
    )
    add_tokens: list[str] = Field(
        default_factory=list, description="new tokens such as [<tool>], one id each"
    )
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="where transformers puts the layers: auto, cpu, cuda:0 or a mapping; default: all on the run's device",
    )
    trust_remote_code: bool = Field(
        False, description="run the Python files that came with the model, in this run only"
    )
    task: Task | None = Field(
        None, description="what the answers are: chooses the figures of answers to held-out prompts"
    )
    objective: Any = Field(description="what the loss is")
    adaptation: Any = Field(description="which weights are trained")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    samples: SampleConfig = SampleConfig()
    seed: int = Field(0, ge=0, lt=2**32, description="of row order, dropout and new weights")

    @field_validator("add_tokens")
    @classmethod
    def _check_tokens(cls, tokens: list[str]) -> list[str]:
        for token in sorted(tokens):
            if tokens.count(token) > 1:
                raise ValueError(f"{token!r} is listed twice")
        if not all(token.strip() for token in tokens):
            raise ValueError("a token that is empty or only spaces cannot be added")
        return tokens

    @property
    def generate(self) -> GenerateConfig | None:
        """The answers at every evaluation: ``data.eval.generate``, or its defaults if the recipe names a task."""
        if self.data.eval.generate is not None or self.task is None:
            return self.data.eval.generate
        return GenerateConfig() if eval_sources(self.data) or self.data.eval.fraction else None

    @property
    def answer_metrics(self) -> list[str]:
        """Names of the figures of these answers."""
        return list(self.generate.metrics or tasks.metrics_of(self.task)) if self.generate else []

    @property
    def default_learning_rate(self) -> float:
        """The adaptation's own, times the factor of the objective."""
        adaptation = adaptations.module(adaptations.name_of(self.adaptation)).Adaptation
        traits: objectives.Traits = objectives.module(objectives.name_of(self.objective)).Objective.traits
        return float(f"{adaptation.learning_rate * traits.rate:.6g}")

    def resolved(self) -> JsonObject:
        """The recipe as plain data, every default filled in; ``recipe.yaml`` of the run folder holds this."""
        out = self.model_dump(mode="json")
        for part, package in (("objective", objectives), ("adaptation", adaptations)):
            keys = dict(self)[part]
            out[part] = {"type": package.name_of(keys), **keys.model_dump(mode="json")}
        return out


def brief(recipe: Recipe) -> str:
    """A line for each part of the run: keys that matter in every run, and those not at their default."""
    objective, adaptation = objectives.name_of(recipe.objective), adaptations.name_of(recipe.adaptation)
    rate = recipe.train.learning_rate or recipe.default_learning_rate
    length = "max_steps" if recipe.train.max_steps else "epochs"
    held_out = recipe.data.eval
    sets = [f"{name}: {_source(source)}" for name, source in (held_out.sets or {}).items()]
    own_lines = ("model", "objective", "adaptation", "data", "train", "samples")
    data_keys = _settings(recipe.data, hidden=("train", "eval"))
    train_keys = _settings(recipe.train, (length, "batch_size", "lr_scheduler_type"), ("learning_rate",))
    parts = {
        "model": [recipe.model, *_settings(recipe, ("seed",), hidden=own_lines)],
        "objective": [objective, *_settings(recipe.objective, tuple(dict(recipe.objective)))],
        "adaptation": [adaptation, *_settings(recipe.adaptation, tuple(dict(recipe.adaptation)))],
        "data": [", ".join(map(_source, recipe.data.train)), *data_keys],
        "eval": sets or _settings(held_out, ("path" if held_out.path else "fraction",)),
        "train": [f"learning_rate {rate:g}", *train_keys],
    }
    return "\n".join(f"{name:<11} {'  '.join(words)}" for name, words in parts.items())


def _shown(value: object) -> object:
    """Return a list of rewards as the recipe has it: ``{type: length, max: 30}``; any other value as it is."""
    if not isinstance(value, list) or not all(isinstance(one, BaseModel) for one in value):
        return value
    items = [", ".join(f"{key}: {item}" for key, item in _given(one).items()) for one in value]
    return ", ".join(f"{{{item}}}" for item in items)


def _given(item: BaseModel) -> dict[str, object]:
    keys = dict(item)
    return {"type": keys["type"], **{key: value for key, value in keys.items() if changed(item, key)}}


def _source(source: Source) -> str:
    return " ".join([source.path, *_settings(source, hidden=("path",))])


def _settings(config: BaseModel, always: tuple[str, ...] = (), hidden: tuple[str, ...] = ()) -> list[str]:
    """``["r 8", "lora_alpha 16"]``: the keys of ``always`` and those not at their defaults; no nulls."""
    values, fields = dict(config), type(config).model_fields
    keys = [*always, *(key for key in fields if key not in hidden and changed(config, key))]
    return [
        f"{key} {values[key]:g}" if isinstance(values[key], float) else f"{key} {_shown(values[key])}"
        for key in dict.fromkeys(keys)
        if values[key] is not None
    ]


def changed(config: BaseModel, key: str) -> bool:
    """Return whether a key differs from its default."""
    default = type(config).model_fields[key].get_default(call_default_factory=True)
    return bool(dict(config)[key] != default)
