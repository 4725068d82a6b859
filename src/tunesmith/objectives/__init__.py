"""Objectives: what the loss is. One file each; the file's name is its key in the recipe.

A new objective is one file here with a ``Config`` and a class ``Objective`` that keeps the contract below, and one row in
``tests/matrix``. An objective never knows how the weights are adapted nor which network they belong to.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Batch, Example, Source, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Example",
    "Layout",
    "Metrics",
    "Objective",
    "Session",
    "Source",
    "Step",
    "TaskHead",
    "Traits",
]

Metrics = dict[str, tuple[Any, Any]]
"""Metric name -> (sum, count), device tensors or numbers. An objective gives the same names for every batch."""


@dataclass(frozen=True)
class Traits:
    """What the rest of the program may ask of an objective without knowing which one it is."""

    rows: tuple[type, ...]
    """Row types that it accepts (``data.rows``)."""
    head: Literal["lm", "score", "token", "span"] = "lm"
    """Which AutoModel class is loaded: a language model, or a body with this head."""
    best: tuple[str, Literal["min", "max"]] = ("eval_loss", "min")
    """The evaluation figure that chooses the best model."""
    overlong: Literal["error", "split", "drop", "truncate"] = "error"
    """Policy for a row above ``max_length``."""
    fits_rows: bool = False
    """``encode`` applies that policy itself."""
    deterministic: bool = False
    """Dropout is off: log-probabilities and rewards are facts of the weights, not of a draw."""
    shares_prompts: bool = False
    """An example holds several answers to one prompt (``data.batch.shared_prompts``)."""
    needs_reference: bool = False
    """Examples need ``reference_logps``: what ``reference_logps`` gave for them before the first step."""
    starter: Mapping[str, Any] = field(default_factory=lambda: {"path": "builtin:docstrings"})
    """Training rows that ``tunesmith init`` writes where no file is named: keys of ``data.train``."""
    assumed: bool = False
    """A model with this head is taken for one of this objective where it does not say what it was trained for."""
    rewards: bool = False
    """Its model gives each answer one number that says how good it is; ``tunesmith score`` prints it."""
    single_label_keys: tuple[str, ...] = ()
    """Keys of its ``Config`` that apply to rows with a single label only."""
    samples: bool = False
    """Steps are made of answers that the policy samples, not of the rows of a file alone."""


class Session(Protocol):
    """What an objective may use of a run. ``model`` is there once the weights are loaded, before the first step."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: Any
    seed: int
    epochs: Source
    """Steps made of the recipe's own rows, in the order of seed and epoch."""

    def forward(self, run: Callable[[Any, Batch], Sequence[Any]], step: Step) -> dict[int, Any]:
        """Call ``run(model, batch)`` without gradients on this process's examples of ``step``, as many at a time as fit
        into memory; ``run`` returns one value for each example of its batch. Returns {place in the step: value}."""
        ...

    def all_reduce(self, values: Any) -> Any:
        """Sum a tensor over all processes; every process must call it."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> list[list[int]]:
        """Sample the token ids of one answer of the policy to each prompt (temperature 0 = greedy); one that stopped ends
        with its stop token."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the run's metrics."""
        ...


class Objective:
    """The contract. Every objective writes ``encode``, ``collate``, ``count``, ``loss``, ``evaluate`` and ``summarise``;
    all else has a default here. A method that raises NotImplementedError has none: a subclass must write it."""

    traits: Traits
    """Of the class; an instance may replace it by what its configuration or its labels decide."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.notes: list[str] = []
        """Decisions the recipe does not show; printed once after the data are read."""
        self.facts: dict[str, Any] = {}
        """JSON of all that decides what an example is, in addition to ``config``: part of the cache's key."""
        self.max_length: int | None = None
        """Tokens an example may have; None = no limit."""

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        """Take what the objective needs of the network's ``config`` and the tokenizer; called before any row is encoded."""
        self.max_length = max_length

    def scan(self, rows: Iterable[Any]) -> None:
        """Look at all training rows before any is encoded (labels, balance); they are read only as far as they are iterated.
        Raises DataError."""

    def encode(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        """Tokenise rows; a list of examples for each (several when a conversation is expanded by turn, none when dropped)."""
        raise NotImplementedError

    def extend(self, data: Any) -> Any:
        """The encoded data set with what only all of it can give to an example; see ``Encoded.attach``."""
        return data

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """One micro-batch: a single packed sequence with segments, or right-padded rows. Pure; needs no model."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Loss units of the micro-batch (supervised tokens, pairs, rows), known before the forward pass."""
        raise NotImplementedError

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """(sum of the loss over its units, metrics): device tensors; no mean, no ``.item()``, no ``float()``."""
        raise NotImplementedError

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Small records of a batch (sums and counts, ids, spans), never logits."""
        raise NotImplementedError

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Figures over all records, such as ``eval_loss``."""
        raise NotImplementedError

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[Any]:
        """For each example of the batch, log-probabilities float64 (n,): kept before the first step, and from then on part
        of the example as ``reference_logps``. Only where ``traits.needs_reference``."""
        raise NotImplementedError

    def source(self, session: Session) -> Source:
        """The optimiser steps of the run; by default the recipe's rows."""
        return session.epochs


class TaskHead(Objective):
    """An objective whose network has a head of its own: labels are found, configured, saved and restored with it."""

    def restore_labels(self) -> None:
        """Take labels and thresholds from the saved model that was bound. Raises DataError when it has none."""
        raise NotImplementedError

    def head_config(self) -> dict[str, Any]:
        """Entries of the network's config that the head needs (``id2label``, ``problem_type``)."""
        raise NotImplementedError

    def choose_threshold(self, records: Sequence[dict[str, Any]]) -> None:
        """Choose on held-out rows what the saved model needs in addition to its weights."""

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All figures of held-out rows, as JSON: by class, by type, tables and curves."""
        raise NotImplementedError

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The model's answer to each row: {row, prediction, gold, loss, ...}, in the order of rows."""
        raise NotImplementedError

    def present(self, row: Any, answer: dict[str, Any]) -> dict[str, Any]:
        """One of ``answers`` as a user reads it, next to its row."""
        raise NotImplementedError


def head_config(objective: Objective) -> dict[str, Any]:
    """Entries of the network's config for the objective's head; empty for a language model."""
    return objective.head_config() if isinstance(objective, TaskHead) else {}


def names() -> list[str]:
    """The keys valid under ``objective:``."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The file of one objective, imported when asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def name_of(config: Any) -> str:
    """The key of the file that ``config`` belongs to."""
    return type(config).__module__.rpartition(".")[2]
