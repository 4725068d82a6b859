"""A saved model with the objective it was trained for, ready to read rows as the evaluation of a run does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from tunesmith import objectives
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.store.epochs import epochs
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.evaluate.trained_reading import ModelArgument, trained_with
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.find import record
from tunesmith.models.find.locate import locate
from tunesmith.models.heads import head_types
from tunesmith.models.load import load
from tunesmith.models.load.compute_dtype import ComputeDtype, cast_and_move
from tunesmith.models.network import base, first_position, tunesmith_settings
from tunesmith.objectives import Example, Objective, TaskHead
from tunesmith.train import distributed, fast_path
from tunesmith.train.meta_model import window_of
from tunesmith.train.session import RunSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class OpenedModel:
    """``name``: the objective's. A model in memory (not ``loaded_here``) keeps its dtype and device."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    objective: Objective
    loaded_here: bool
    max_length: int | None
    """Most tokens of a row: the caller's limit, or the one that training used; None = the model's window."""
    trained: JsonObject
    """Facts about the training that were saved with the model (``record.trained``)."""

    def prepare(
        self, wanted: str, examples: Sequence[Example], longest: int
    ) -> tuple[fast_path.FastPath, ComputeDtype]:
        """Cast and move the network, and choose its fast path by two short ``examples``.

        ``wanted``: ``precision`` of a recipe. ``longest``: tokens of the longest row. The caller must call
        ``disable`` of the returned fast path after its last forward pass.
        """
        chosen = ComputeDtype(self.network.dtype, "the dtype of the model in memory")
        if self.loaded_here:
            chosen = cast_and_move(self.network, wanted, distributed.state().device)
        route = fast_path.choose(self.network, self.objective, examples, longest, "auto", self.device)
        return route, chosen

    def session(self, rows: Encoded, route: fast_path.FastPath, budget: int) -> RunSession:
        """Return what an objective that samples answers to ``rows`` may use of an evaluation."""
        source = epochs(rows, self.objective.collate, len(rows), 0, shuffle=False, passes=1, max_steps=None)
        return RunSession(self.tokenizer, self.device, 0, source, self.network, route, budget)

    @property
    def task(self) -> TaskHead:
        """Return the objective of a model that does not write text."""
        assert isinstance(self.objective, TaskHead)
        return self.objective

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device


def open_model(
    model: ModelArgument,
    objective: str | None = None,
    overlong: str | None = None,
    max_length: int | None = None,
    rewards: bool = False,
) -> OpenedModel:
    """Load ``model`` and the objective that evaluates its rows.

    ``objective``: None = the one it was trained for. ``rewards``: read a single number of a model that does
    not name its objective as a reward (as TRL saves them), not as a regression value. Raises UserError for a
    model that cannot do what is asked.
    """
    names = objectives.names()
    if objective is not None and objective not in names:
        raise ModelError(f"unknown objective {objective!r}; expected one of {', '.join(names)}")
    trained = trained_with(model)
    network, tokenizer = model if isinstance(model, tuple) else load.load(model)
    architecture = type(base(network)).__name__
    head = head_types.kind_of(architecture)
    config = base(network).config
    saved = getattr(config, "tunesmith", None) or {}
    recorded = trained.get("objective") or {}
    remembered = saved.get("objective") or recorded.get("type")
    name = objective or remembered or assumed_objective(head, rewards and config.num_labels == 1)
    module = objectives.module(name)
    keys = (
        {key: value for key, value in recorded.items() if key != "type"}
        if name == recorded.get("type")
        else {}
    )
    try:
        chosen: Objective = module.Objective(
            module.Config(**keys | ({"overlong": overlong} if overlong else {}))
        )
    except ValidationError as error:
        raise RecipeError(f"overlong: {error.errors()[0]['msg']}, got {overlong!r}") from None
    if chosen.traits.head != head:
        matching = ", ".join(key for key in names if objectives.module(key).Objective.traits.head == head)
        needed = head_types.CLASSES[chosen.traits.head].removeprefix("AutoModel")
        raise ModelError(
            f"{name} needs a {needed}, and this model is a {architecture}.\n  Objectives for it: {matching}."
        )
    if max_length is None and chosen.traits.overlong in ("drop", "truncate"):  # rows are cut as in training
        max_length = trained.get("max_length")
    window = window_of(config, virtual_tokens.count(network) + first_position(base(network)))
    if max_length is not None and window is not None and max_length > window:
        raise DataError(
            f"max_length {max_length} is above the model's window of {window} tokens. Take at most {window}."
        )
    chosen.bind(config, tokenizer, max_length or window)
    if isinstance(chosen, TaskHead):
        chosen.restore_labels()
    return OpenedModel(network, tokenizer, name, chosen, not isinstance(model, tuple), max_length, trained)


def objective_of(model: str | Path) -> str:
    """Return the name of the objective that evaluates a saved model. No weight is loaded."""
    folder = locate(model, checkpoints=True)
    saved = tunesmith_settings(load.load_config(folder))
    recorded = record.trained(folder.path).get("objective") or {}
    return str(saved.get("objective") or recorded.get("type") or assumed_objective(load.head_of(folder)))


def assumed_objective(head: str, rewards: bool = False) -> str:
    """Return the objective to assume for a model with this ``head`` that names none."""
    traits = {name: objectives.module(name).Objective.traits for name in objectives.names()}
    matching = {name: trait for name, trait in traits.items() if trait.head == head}
    rewarding = [name for name, trait in matching.items() if trait.rewards] if rewards else []
    return (rewarding or [name for name, trait in matching.items() if trait.assumed])[0]
