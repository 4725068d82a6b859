"""The keys of a recipe.

The keys of each part live next to what they configure (``data/data_config.py``, ``train/train_config.py``, every objective and adaptation
file); this module only nests them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tunesmith import adaptations, objectives
from tunesmith.data.data_config import DataConfig, Source
from tunesmith.train.train_config import SampleConfig, TrainConfig

DEFAULT_OBJECTIVE = "sft"
DEFAULT_ADAPTATION = "lora"
"""Used where a recipe names none."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recipe(Strict):
    """A whole run. ``objective`` and ``adaptation`` hold the ``Config`` of the chosen file."""

    model: str = Field(description="catalog name, folder, run folder or adapter folder")
    adapter: Literal["continue", "merge", "new"] | None = Field(
        None,
        description="when `model` is an adapter: train it on, fold it into its base first, or leave it and start anew",
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
            raise ValueError(
                f"{twice[0]!r} stands there twice"
                if twice
                else "a token of spaces, or of nothing, cannot be added"
            )
        return tokens

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, every default filled in; ``recipe.yaml`` of the run folder holds this."""
        out = self.model_dump(mode="json")
        out["objective"] = {
            "type": objectives.name_of(self.objective),
            **self.objective.model_dump(mode="json"),
        }
        out["adaptation"] = {
            "type": adaptations.name_of(self.adaptation),
            **self.adaptation.model_dump(mode="json"),
        }
        return out


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
            *_shown(
                recipe, ("seed",), hidden=("model", "objective", "adaptation", "data", "train", "samples")
            ),
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
    keys = dict.fromkeys(
        [*always, *(key for key in type(config).model_fields if key not in hidden and changed(config, key))]
    )
    values = {key: getattr(config, key) for key in keys}
    return [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if value is not None
    ]


def changed(config: BaseModel, key: str) -> bool:
    """Whether a key differs from its default."""
    return bool(getattr(config, key) != type(config).model_fields[key].get_default(call_default_factory=True))
