"""Objectives: what the loss is. One file each; the file's name is its key in the recipe.

A new objective is one file here with a ``Config`` and a class ``Objective`` that keeps the contract below,
and one row in ``tests/matrix``. An objective never knows how the weights are adapted nor which network they
belong to.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from tunesmith.data.batch import pack, shared_prompts
from tunesmith.data.batch.pack import Layout
from tunesmith.data.batch.step import Batch, Example, Source, Step
from tunesmith.data.encode import texts
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.metrics.intervals import RowFigure, RowValues
from tunesmith.metrics.token_mean import sums_by_row, token_mean
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.rollout.session_protocol import Session

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.data.store.encoded_rows import Encoded

__all__ = [
    "Baseline", "Batch", "Config", "Example", "JsonObject", "LanguageModel", "Layout", "Metrics", "Objective", "Overlong",
    "Session", "Source", "Step", "TaskHead", "Traits",
]  # fmt: skip

Metrics: TypeAlias = "dict[str, tuple[torch.Tensor, torch.Tensor | int]]"
"""Metric name -> (sum, count), on the device. An objective returns the same names for every batch."""

Overlong = Literal["error", "drop", "truncate"]
"""Policies for a row above ``max_length`` that most objectives offer."""


@dataclass(frozen=True)
class Baseline:
    """The figure of a rule that needs no model, such as "always the most frequent class".

    ``rows``: each row's terms of the figure; None for a figure that is not a function of sums over rows."""

    words: str
    value: float
    rows: RowFigure | None = None

    @classmethod
    def of_rows(cls, words: str, figure: RowFigure) -> Baseline:
        return cls(words, figure.value or 0.0, figure)


class Config(BaseModel):
    """Base of the keys of an objective."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Traits:
    """Facts about an objective that other code may ask for without knowing which objective it is."""

    rows: tuple[type, ...]
    """Row types that it accepts (``data.rows``)."""
    head: Literal["lm", "score", "token", "span"] = "lm"
    """The AutoModel class to load: a language model, or a body with this head."""
    best: tuple[str, Literal["min", "max"]] = ("eval_loss", "min")
    """The evaluation figure that chooses the best model."""
    figures: tuple[str, ...] = ("eval_loss", "perplexity")
    """The evaluation figures that may choose the best model. An evaluation may report only some of them."""
    overlong: Literal["error", "split", "drop", "truncate"] = "error"
    """Policy for a row above ``max_length``."""
    fits_rows: bool = False
    """True if ``encode`` applies the ``overlong`` policy itself."""
    deterministic: bool = False
    """Dropout is off, because log-probabilities and rewards must depend on the weights alone."""
    shares_prompts: bool = False
    """A batch computes once what several answers begin with (``data.batch.shared_prompts``)."""
    shares_beginnings: bool = False
    """A batch computes once what several rows begin with before their first target, such as a system message."""
    needs_reference: bool = False
    """Examples need the ``reference_logps`` that :meth:`Objective.reference_logps` returned before step 1."""
    starter: Mapping[str, object] = field(default_factory=lambda: {"path": "builtin:docstrings"})
    """Training rows that ``tunesmith init`` writes when no file is named: keys of ``data.train``."""
    starter_keys: Mapping[str, object] = field(default_factory=dict)
    """Keys of its ``Config`` without a default, as ``tunesmith init`` writes them."""
    assumed: bool = False
    """A saved model with this head that names no objective is taken for one of this objective."""
    rewards: bool = False
    """Its model scores each answer with one number; ``tunesmith score`` prints it."""
    single_label_keys: tuple[str, ...] = ()
    """Keys of its ``Config`` that apply to rows with a single label only."""
    value_head: bool = False
    """Its network has a value head (``models.heads.value_head``) in addition to the head of ``head``."""
    rate: float = 1.0
    """Factor on the adaptation's default learning rate."""
    keeps_start: bool = False
    """A run keeps the trained weights of step 0 for :meth:`Session.reference`."""
    samples: bool = False
    """Steps are made of answers that the policy samples to the prompts of a file."""


def preference_traits(row: type, builtin: str, figures: tuple[str, ...]) -> Traits:
    """Return the traits of an objective that compares log-probabilities of answers with the reference policy.

    ``row``: its row type. ``builtin``: the built-in rows that ``tunesmith init`` writes. ``figures``: as in
    ``Traits``.
    """
    return Traits(
        rows=(row,), fits_rows=True, deterministic=True, shares_prompts=True, needs_reference=True,
        starter={"path": builtin}, figures=figures,
    )  # fmt: skip


def answer_traits(row: type, rate: float, value_head: bool = False) -> Traits:
    """Return the traits of an objective that learns from rewarded answers of its policy to prompts of type ``row``.

    ``rate`` and ``value_head``: as in ``Traits``."""
    return Traits(
        rows=(row,), best=("eval_reward", "max"), figures=("eval_reward",), fits_rows=True, deterministic=True,
        samples=True, value_head=value_head, rate=rate, shares_prompts=True,
        starter_keys={"rewards": [{"type": "length", "max": 30, "unit": "words"}, {"type": "final_stop"}]},
    )  # fmt: skip


class Objective:
    """The contract. Every objective writes ``encode``, ``collate``, ``loss``, ``evaluate`` and ``summarise``;
    the other methods have a default. A method that raises NotImplementedError must be written by a
    subclass."""

    config: Config
    traits: Traits
    """Set on the class; an instance may replace it by what its configuration or its labels decide."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.traits = replace(self.traits, **config.model_dump(include={"overlong"}))
        self.notes: list[str] = []
        """Decisions the recipe does not show; printed once after the data are read."""
        self.facts: JsonObject = {}
        """All that decides what an example is, in addition to ``config``: part of the cache's key."""
        self.max_length: int | None = None
        """Tokens an example may have; None = no limit."""

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        """Read what is needed of the network's ``config`` and tokenizer, before any row is encoded."""
        self.max_length = max_length
        if self.traits.fits_rows:
            self.facts |= {"max_length": max_length, "overlong": self.traits.overlong}

    def scan(self, rows: Iterable[object]) -> None:
        """Look at all training rows before any is encoded (labels, balance); they are read only as far as
        they are iterated. Raises DataError."""

    def encode(self, rows: Sequence[Any], tokenizer: Tokenizer) -> list[list[Example]]:
        """Tokenise rows of the types ``traits.rows``. Returns a list of examples for each row: several when a
        conversation is expanded by turn, none when the row is dropped. Raises RowFault."""
        raise NotImplementedError

    def encode_held_out(self, rows: Sequence[Any], tokenizer: Tokenizer) -> list[list[Example]]:
        """Tokenise rows of the evaluation set. They may have labels that the training rows lack."""
        return self.encode(rows, tokenizer)

    def check_labels(self, row: Any, held_out: bool) -> None:
        """Raise RowFault if ``encode`` would refuse the row because of its label or tags."""

    def extend(self, data: Encoded) -> Encoded:
        """Add arrays to the examples that only the whole data set can provide; see ``Encoded.attaching``."""
        return data

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """One micro-batch: a packed sequence with segments, or right-padded rows. Needs no model."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Loss units of the micro-batch, known before the forward pass: by default its rows."""
        return len(batch["rows"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Return (sum of the loss over its units, metrics) as tensors on the device.

        Call no ``.item()`` or ``float()``, and take no mean."""
        raise NotImplementedError

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """Small records of a batch (sums and counts, ids, spans), never logits."""
        raise NotImplementedError

    def sample_records(self, session: Session, step: Step) -> list[JsonObject]:
        """With ``traits.samples``: sample and score an answer to each prompt of ``step``; one record for each.
        An evaluation of the run calls it instead of :meth:`evaluate`, in every process."""
        raise NotImplementedError

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Return figures over all records, such as ``eval_loss``."""
        raise NotImplementedError

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        """Return the figures of ``summarise`` that are a function of sums over rows, as each row's terms.

        Only these figures and their differences have an interval."""
        return {}

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return, by figure of :meth:`summarise`, what a rule without a model reaches on the same rows.

        The loss of a language model has none: it is compared with the loss before training."""
        return {}

    def remarks(self, records: Sequence[JsonObject]) -> list[str]:
        """Return sentences on faults that no figure shows, such as a model that predicts only one class."""
        return []

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the model's answer to each row, in the order of rows: {row, prediction, gold, loss, ...}.

        Empty for an objective whose answers are generated text."""
        return []

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
        """Log-probabilities float64 (n,) of each example of the batch. With ``traits.needs_reference`` they
        are computed before the first step and become part of the example as ``reference_logps``."""
        raise NotImplementedError

    def source(self, session: Session) -> Source:
        """The optimiser steps of the run; by default the recipe's rows."""
        return session.epochs


class LanguageModel(Objective):
    """An objective that predicts the supervised tokens of each row from the tokens before them."""

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return {**shared_prompts.with_targets(examples, layout), "rows": pack.file_rows(examples)}

    def count(self, batch: Batch) -> int:
        """Supervised tokens; the first token of a row has nothing before it and is none."""
        return int(batch["labels"].numel())

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Sum over supervised tokens of -log p(token | everything before it in its row)."""
        from tunesmith.models.heads.lm_head import lm_loss

        return lm_loss(model, batch), {}

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """Return (sum of losses, supervised tokens) of each example, and the row that it came from."""
        from tunesmith.models.heads.lm_head import row_losses

        return {"rows": row_losses(model, batch), "places": batch["rows"]}

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Mean over all supervised tokens, for any batching, its standard error, and its exponential."""
        return token_mean(records)

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        """Return loss and perplexity. Blocks of one document and turns of one conversation count as one row."""
        rows = sums_by_row(records)
        return {"eval_loss": RowFigure(rows), "perplexity": RowFigure(rows, "exponential")}


class TaskHead(Objective):
    """An objective whose network has a task head: it finds, configures and restores the labels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.causal = False
        """The bound network is a decoder."""
        self.saved: JsonObject = {}
        """Settings that an earlier training wrote about its head into the config of the bound model."""
        self.has_head = False
        """The bound model has a trained head for this objective."""
        self.restored = False
        """Labels come from the saved model, so training rows do not change them."""
        self.pad: int | None = None
        """Id of the padding token of a decoder with a score head: a token that never ends a row."""

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        self.causal = network.is_causal(config)
        self.saved = getattr(config, "tunesmith", None) or {}
        kind = head_types.kind_of((config.architectures or [""])[0])
        self.has_head = self.saved.get("objective") == name_of(self) or kind == self.traits.head
        if tokenizer.pad_token is None:  # for other libraries that pad; tunesmith masks padding by position
            tokenizer.pad_token = tokenizer.eos_token
        if self.causal and self.traits.head == "score":
            # transformers reads the score of a decoder at the last token that is not padding
            texts.set_padding_token(tokenizer, getattr(config.get_text_config(), "vocab_size", None))
            self.pad = tokenizer.pad_token_id

    def restore_labels(self) -> None:
        """Take labels and thresholds from the bound model. Raises DataError when it has no trained head."""
        if not self.has_head:
            name = name_of(self)
            raise DataError(
                f"this model has no trained head for objective: {name}.\n  Train one, or name a model that has one."
            )
        self.restored = True

    def head_config(self) -> JsonObject:
        """Entries of the network's config that the head needs (``id2label``, ``problem_type``)."""
        raise NotImplementedError

    def label_config(self, names: Sequence[str], saved: JsonObject, **entries: object) -> JsonObject:
        """``head_config`` of these label names. ``saved``: what :attr:`saved` holds when the model is opened
        again; ``entries``: further keys of the network's config."""
        pad = {} if self.pad is None else {"pad_token_id": self.pad}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            **entries,
            "tunesmith": {"objective": name_of(self), **saved},
            **pad,
        }

    def choose_threshold(self, records: Sequence[JsonObject]) -> None:
        """Choose on held-out rows what the saved model needs in addition to its weights."""

    def details(self, records: Sequence[JsonObject]) -> JsonObject:
        """All figures of held-out rows, as JSON: by class, by type, tables and curves."""
        raise NotImplementedError

    def group_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        """Return the F1 (of pairs: the accuracy) of each class, type or group of :meth:`details`, as each
        row's terms."""
        return {}

    def present(self, row: Any, answer: JsonObject) -> JsonObject:
        """Format one of ``answers`` for the user, next to its row."""
        raise NotImplementedError


def sum_over_pairs(
    losses: torch.Tensor, figures: Mapping[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, Metrics]:
    """Sum over rows of the mean over their pairs (Ouyang et al. 2022, equation 1), of the loss and of each
    figure.

    ``losses`` and ``figures``: (pairs,), in the order of ``batch["pairs"]``."""
    weights, rows = batch["weights"].to(losses), len(batch["rows"])
    metrics: Metrics = {name: ((weights * value.detach()).sum(), rows) for name, value in figures.items()}
    return (weights * losses).sum(), metrics


def always_longer(longer: RowValues) -> Baseline:
    """Return the baseline of an accuracy over pairs: always the longer answer, or always the shorter one.

    It is the rule that is right more often. ``longer``: row -> (pairs whose better answer is the longer one,
    all pairs); a tie counts half."""
    always = Baseline.of_rows("always the longer answer", RowFigure(longer))
    if always.value >= 0.5 or not longer:
        return always
    shorter = {place: (pairs - count, pairs) for place, (count, pairs) in longer.items()}
    return Baseline.of_rows("always the shorter answer", RowFigure(shorter))


def mean_loss(losses: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Return ``eval_loss`` with its standard error, from (sum of losses, units) of each row."""
    figures = token_mean([{"rows": losses}])
    return {name: value for name, value in figures.items() if name != "perplexity"}


def head_config(objective: Objective) -> JsonObject:
    """Entries of the network's config for the objective's head; empty for a language model."""
    return objective.head_config() if isinstance(objective, TaskHead) else {}


def names() -> list[str]:
    """The keys valid under ``objective:``."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """Import the file of one objective."""
    return importlib.import_module(f"{__name__}.{name}")


def name_of(part: object) -> str:
    """The key of the file that a ``Config`` or an ``Objective`` belongs to."""
    return type(part).__module__.rpartition(".")[2]
