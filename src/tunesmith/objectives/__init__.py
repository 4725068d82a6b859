"""Objectives: what the loss is. One file each; the file's name is its key in the recipe.

A new objective is one file here with a ``Config`` and an ``Objective`` class that keeps this contract, and one row in
``tests/matrix``. An objective never knows how the weights are adapted nor which network they belong to.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Example = dict[str, np.ndarray]
"""One row, ready to learn from: name -> 1-D array. Language models use ``input_ids`` (int32) and ``supervised`` (bool)."""

Batch = dict[str, Any]
"""Tensors of one micro-batch, on the device."""


class Objective(Protocol):
    """What the engine needs of an objective.

    ``head``      "lm" | "score" | "token" | "span": which AutoModel class is loaded.
    ``rows``      the row types it accepts.
    ``best``      (metric, "min" | "max"): which evaluation figure chooses the best model.
    ``overlong``  "error" | "split" | "drop" | "truncate": what becomes of a row above ``max_length``; "own" = ``encode`` decides.
    ``deterministic``  whether dropout is off: its figures are facts of the weights, not of a draw.
    """

    head: str
    rows: tuple[type, ...]
    best: tuple[str, str]
    overlong: str
    deterministic: bool
    shared: bool
    """Whether a packed batch holds what several answers begin with once. The route switches it off where that is not exact."""
    reference: Any
    """What it compares the policy with (``preference_batch.Reference``), to be filled before the first step; None = nothing."""
    notes: Sequence[str]
    """What it decided that is not plain from the recipe, to be said once the data are known."""
    max_length: int | None
    """Tokens that an example may have; None = no limit."""
    facts: dict[str, Any]
    """JSON of all that decides what an example is, besides the config: what ``adopt`` and ``survey`` found out."""

    def adopt(self, config: Any, tokenizer: Any, max_length: int | None) -> None:
        """Called first, with the network's config and the most tokens that an example may have (None = no limit).

        A saved head's labels and settings are taken from the config.
        """
        ...

    def survey(self, rows: Iterable[Any]) -> None:
        """Look at all training rows before any is encoded; they are read only as far as they are iterated. Raises DataError."""
        ...

    def head_config(self) -> dict[str, Any]:
        """Entries of the network's config that its head needs (``id2label``, ``problem_type``); empty for a language model."""
        ...

    def encode(self, rows: Sequence[Any], tokenizer: Any) -> list[list[Example]]:
        """Tokenise rows; one list of examples for each row (several when a conversation is expanded by turn)."""
        ...

    def collate(self, examples: Sequence[Example], packed: bool) -> Batch:
        """One micro-batch: a single packed sequence with segments, or right-padded rows. Pure; needs no model."""
        ...

    def count(self, batch: Batch) -> Any:
        """Loss units of the micro-batch (supervised tokens, pairs, rows) as a tensor, known before the forward pass."""
        ...

    def loss(self, model: Any, batch: Batch) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        """(sum of the loss over its units, {metric: (sum, count)}): device tensors, no mean, no ``.item()``."""
        ...

    def batches(self, model: Any, loader: Iterable[Any]) -> Iterable[Any]:
        """The optimiser steps, each with its micro-batches; passes ``loader`` through unless the objective makes its own data."""
        ...

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Small records of a batch (sums and counts, ids, spans), never logits."""
        ...

    def tune(self, records: Sequence[dict[str, Any]]) -> None:
        """Choose on held-out rows what the saved model needs besides its weights, such as a threshold."""
        ...

    def of_model(self) -> None:
        """Take what was learnt from the model that was adopted (labels, thresholds). Raises DataError."""
        ...

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All figures of held-out rows, as JSON: by class, by type, tables and curves."""
        ...

    def present(self, row: Any, answer: dict[str, Any]) -> dict[str, Any]:
        """One of ``answers`` as a user reads it, beside the row it is about."""
        ...

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the model said of each row, from the records of ``evaluate``: row, prediction, gold, loss. Empty for a language
        model, whose answers are generated."""
        ...

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Corpus figures from all records, such as ``eval_loss``."""
        ...


def names() -> list[str]:
    """The keys valid under ``objective:``."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The file of one objective, imported when asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def name_of(config: Any) -> str:
    """The key of the file that ``config`` belongs to."""
    return type(config).__module__.rpartition(".")[2]
