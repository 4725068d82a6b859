"""A saved model with the objective that it was trained for, ready to read rows by the same path as a run's own evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from tunesmith import objectives
from tunesmith.data.data_config import Source
from tunesmith.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Opened:
    """``own``: whether it was loaded here; somebody's own model in memory keeps its dtype and its place."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    objective: Any
    own: bool

    def ready(self, precision: str, first: Sequence[Any], longest: int) -> Any:
        """Cast and place the network and find its route; ``first``: two short examples. Returns the route, to be left again."""
        from tunesmith.train import distributed, fast_path
        from tunesmith.train import precision as precisions

        if self.own:
            device = distributed.state().device
            precisions.cast(self.network, precisions.choose(precision, device).compute)
            self.network.to(device).eval().requires_grad_(False)
        return fast_path.choose(self.network, self.objective, first, longest, "auto", self.network.device)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device


def open_model(
    model: str | Path | tuple[Any, Any],
    objective: str | None = None,
    overlong: str | None = None,
    max_length: int | None = None,
    rewards: bool = False,
) -> Opened:
    """Load ``model`` (a name, a folder, or a pair (model, tokenizer)) and what judges its rows.

    ``objective``: None = what the model was trained for. ``rewards``: whether one number for a row, of a model that does not say
    what for, is a reward (as TRL saves them) and no value of a text. Raises UserError for a model that cannot do what is asked.
    """
    from tunesmith.models.adapters import virtual_tokens
    from tunesmith.models.heads import head_types
    from tunesmith.models.load import load
    from tunesmith.models.network import base
    from tunesmith.train.meta_model import window_of

    if objective is not None and objective not in objectives.names():
        raise ModelError(f"unknown objective {objective!r}; expected one of {', '.join(objectives.names())}")
    network, tokenizer = model if isinstance(model, tuple) else load.load(model)
    kind = head_types.kind_of(type(base(network)).__name__)
    config = base(network).config
    said = objective or (getattr(config, "tunesmith", None) or {}).get("objective")
    name = said or _guessed(kind, rewards and config.num_labels == 1)
    module = objectives.module(name)
    try:
        chosen = module.Objective(module.Config(**({"overlong": overlong} if overlong else {})))
    except ValidationError as error:
        raise RecipeError(f"overlong: {error.errors()[0]['msg']}, got {overlong!r}") from None
    if chosen.traits.head != kind:
        fitting = ", ".join(
            one for one in objectives.names() if objectives.module(one).Objective.traits.head == kind
        )
        is_a, needs = (
            type(base(network)).__name__,
            head_types.CLASSES[chosen.traits.head].removeprefix("AutoModel"),
        )
        raise ModelError(f"{name} needs a {needs}, and this model is a {is_a}.\n  It goes with: {fitting}.")
    window = window_of(config, virtual_tokens.count(network))
    if max_length is not None and window is not None and max_length > window:
        raise DataError(
            f"max_length {max_length} is above the model's window of {window} tokens. Take at most {window}."
        )
    chosen.bind(config, tokenizer, max_length or window)
    if chosen.traits.needs_reference:
        raise ModelError(
            f"{name} is measured against the model before its first step, which only a run has: its metrics.jsonl and "
            "report hold the figures.\n  Take a reward model to judge answers: tunesmith score."
        )
    if kind != "lm":
        chosen.restore_labels()
    return Opened(network, tokenizer, name, chosen, not isinstance(model, tuple))


def _guessed(head: str, rewards: bool) -> str:
    """What a model with this ``head`` was trained for, where it does not say; ``rewards``: its one number is to be a reward."""
    every = {name: objectives.module(name).Objective.traits for name in objectives.names()}
    of_head = {name: traits for name, traits in every.items() if traits.head == head}
    meant = [name for name, traits in of_head.items() if traits.rewards] if rewards else []
    return (meant or [name for name, traits in of_head.items() if traits.assumed])[0]


def source_of(data: str | Path, **asked: Any) -> Source:
    """The source that ``data`` names. Raises RecipeError for keys that cannot be, or would do nothing."""
    try:
        source = Source(path=str(data), **asked)
    except ValidationError as error:
        raise RecipeError(f"data: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if keys := source.unused_keys():
        raise RecipeError(
            f"{' and '.join(keys)} would do nothing: {data} is no data set of the Hub (hub:OWNER/NAME)"
        )
    return source
