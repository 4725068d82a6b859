"""Classification: one class of several, any number of labels, or a number, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import labels, texts
from tunesmith.data.encode.labels import MULTI, REGRESSION, SINGLE, Survey
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Labelled
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = Field(
        None,
        description="default: what the labels look like (a list of labels, numbers with fractions, else one class)",
    )
    labels: list[str] | None = Field(
        None, min_length=1, description="names of the classes, by id; default: found"
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="balanced = rare classes count as much as frequent ones (of several labels: rows with one as much as those "
        "without it); or {label: weight}",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    pooling: Literal["mean"] | None = Field(
        None,
        description="mean = average of all tokens' outputs; default: the first token of an encoder, a decoder's last",
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what happens to a row above max_length"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        labels.refuse_repeats(self.labels)
        if self.problem_type == REGRESSION:
            for key in ("labels", "class_weights", "label_smoothing"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} goes with classes, and problem_type is regression. Leave out one of the two"
                    )
        if self.problem_type == MULTI and self.label_smoothing:
            raise ValueError(
                "label_smoothing goes with one class of several, and problem_type is multi_label_classification"
            )
        if isinstance(self.class_weights, dict) and any(
            weight <= 0 for weight in self.class_weights.values()
        ):
            raise ValueError("class_weights: expected numbers above 0")
        return self


class Objective(objectives.TaskHead):
    traits = Traits(
        rows=(Labelled,),
        head="score",
        starter={"path": "builtin:classify"},
        assumed=True,
        single_label_keys=("label_smoothing",),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.facts = {"problem": config.problem_type, "labels": config.labels}
        self.traits = replace(self.traits, overlong=config.overlong)
        self.threshold = 0.5
        self._causal = False
        self._ending: tuple[int, ...] = ()
        self._pad: int | None = None
        self._pooling: str | None = config.pooling
        self._averages = False
        self._template = texts.PAIR_TEMPLATE
        self._weights: np.ndarray | None = None
        self._saved: dict[str, Any] = {}
        self._fixed = False
        self._choose_best()

    def _choose_best(self) -> None:
        """The figure that chooses the best model is that of the problem."""
        best: dict[str, tuple[str, Literal["min", "max"]]] = {
            SINGLE: ("eval_accuracy", "max"),
            MULTI: ("eval_micro_f1", "max"),
        }
        self.traits = replace(self.traits, best=best.get(self.problem, ("eval_loss", "min")))

    @property
    def problem(self) -> str:
        return str(self.facts["problem"] or SINGLE)

    @property
    def labels(self) -> list[str]:
        return list(self.facts["labels"] or [])

    # ------------------------------------------------------------------------------------------------ before encoding

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self._causal = network.is_causal(config)
        self.max_length = max_length
        self._ending = tuple(special_ends(tokenizer)[1])
        ours = getattr(config, "tunesmith", None) or {}
        if self._causal:
            texts.set_padding_token(tokenizer, getattr(config.get_text_config(), "vocab_size", None))
            self._pad = tokenizer.pad_token_id
        if (
            ours.get("objective") == "classify"
            or head_types.kind_of((config.architectures or [""])[0]) == "score"
        ):
            self._saved = {
                "problem": config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE),
                "labels": [config.id2label[number] for number in range(config.num_labels)],
            }
            self.threshold = float(ours.get("threshold", 0.5))
            self._pooling = self._pooling or ours.get("pooling")
            self._template = ours.get("pair_template", self._template)
        self._averages = "mean" in (self._pooling, network.pooling(config))
        if self._pooling == "mean":
            self.notes.append(
                "pooling: mean is tunesmith's own and saved as such: load, evaluate and predict open it; transformers' own class "
                "reads one token, whose answers are others"
            )
        self.facts |= {"causal": self._causal, "pad": self._pad, "template": self._template}

    def restore_labels(self) -> None:
        """Take labels and problem from the model that was adopted, as it was saved. Raises DataError when it has none."""
        if not self._saved:
            raise DataError("this model has no head that classifies: train one with objective: classify")
        self.facts |= self._saved
        self._fixed = True
        self._choose_best()

    def scan(self, rows: Iterable[Any]) -> None:
        if self._fixed:
            return
        if self.config.labels and self.config.problem_type and self.config.class_weights != "balanced":
            labels.check_names(self.labels, self.problem)
            self._weigh(None)
            return
        found = labels.survey(row for row in rows if isinstance(row, Labelled))
        problem = self.config.problem_type or found.problem
        names = [] if problem == REGRESSION else self.config.labels or labels.sort_names(found.counts)
        if not self.config.problem_type:
            self.notes += labels.numeric_label_notes(problem, found)
        self.notes += [
            f"labels that look the same are different classes: {' and '.join(map(ascii, group[:5]))}. Are they one? Write them so"
            for group in labels.similar_names(names)
        ]
        if problem != REGRESSION:
            labels.check_names(names, problem)
        if self._saved and problem == self._saved["problem"] and set(names) == set(self._saved["labels"]):
            names = self._saved["labels"]  # a head that knows these labels goes on
        self.facts |= {"problem": problem, "labels": names}
        self._choose_best()
        if problem != SINGLE and self.config.label_smoothing:
            raise RecipeError(
                f"objective.label_smoothing goes with one class of several, and this is {problem}. Leave it out."
            )
        self._weigh(found)
        self.notes += labels.label_notes(problem, names, found)

    def _weigh(self, found: Survey | None) -> None:
        """Weights of the classes. ``balanced``: rows / (classes * rows of the class), whose mean over the rows is 1; with several
        labels rows without / rows with the label, which is what torch suggests for ``pos_weight``."""
        chosen, names = self.config.class_weights, self.labels
        if chosen is None:
            return
        if self.problem == REGRESSION:
            raise RecipeError(
                "objective.class_weights goes with classes, and the labels are numbers. Leave it out."
            )
        if chosen == "balanced":
            assert found is not None
            held = np.array([max(1, found.counts[name]) for name in names])
            several = self.problem == MULTI
            self._weights = (
                np.maximum(1, found.rows - held) / held if several else found.rows / (len(names) * held)
            )
            return
        assert isinstance(chosen, dict)
        for name in chosen:
            if name not in names:
                expected, _, fix = labels.unknown_label(name, names)
                raise RecipeError(f"objective.class_weights.{name}: expected {expected}. {fix}")
        self._weights = np.array([chosen.get(name, 1.0) for name in names])

    def head_config(self) -> dict[str, Any]:
        names = self.labels or ["LABEL_0"]
        ours = {"objective": "classify", "pair_template": self._template, "threshold": self.threshold}
        if self._pooling:
            ours["pooling"] = self._pooling
        pad = {} if self._pad is None else {"pad_token_id": self._pad}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": self.problem,
            "tunesmith": ours,
            **pad,
        }

    # ------------------------------------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        made = texts.encode([(row.text, row.text_pair) for row in rows], tokenizer, self._template)
        for index, (row, example) in enumerate(zip(rows, made)):
            ids = example["input_ids"]
            if not len(ids):
                raise RowFault(
                    index,
                    "text that gives a token",
                    repr(row.text[:40]),
                    "Write something, or delete the row.",
                    "text",
                )
            if self._pad is not None and ids[-1] == self._pad:
                raise RowFault(
                    index,
                    "text that does not end in the padding token",
                    repr(tokenizer.pad_token),
                    "Remove it.",
                    "text",
                )
            example["target"] = self._target(row, index)
        return [[example] for example in made]

    def _target(self, row: Labelled, index: int) -> np.ndarray:
        """float32: the number of the class or the number itself (1,), or 0 and 1 for each label; NaN where nothing is known."""
        names = self.labels
        if self.problem == MULTI:
            if row.labels is None and row.label is None:
                return np.full(len(names), np.nan, np.float32)
            held = row.labels if row.labels is not None else (labels.name_of(row.label),)  # type: ignore[arg-type]
            target = np.zeros(len(names), np.float32)
            for name in held:
                target[self._number(name, index, "label" if row.labels is None else "labels")] = 1.0
            return target
        if row.labels is not None:
            raise RowFault(
                index,
                "one label",
                f"a list of {len(row.labels)}",
                "Set objective.problem_type=multi_label_classification.",
                "labels",
            )
        if row.label is None:
            return np.array([np.nan], np.float32)
        if self.problem == REGRESSION:
            value = labels.as_number(row.label)
            if value is None:
                raise RowFault(
                    index,
                    "a number",
                    repr(row.label),
                    "Write a number of at most 1e18, or delete the row.",
                    "label",
                )
            return np.array([value], np.float32)
        return np.array([self._number(labels.name_of(row.label), index, "label")], np.float32)

    def _number(self, name: str, index: int, field: str) -> int:
        if name not in self.labels:
            raise RowFault(index, *labels.unknown_label(name, self.labels), field)
        return self.labels.index(name)

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """``targets`` (rows, k) float32; ``positions``: the token that each row is read at, or all of them for their mean."""
        import torch

        if self._ending:
            examples = [self._closed(example) for example in examples]
        lengths = [len(example["input_ids"]) for example in examples]
        if self._averages:
            read = [np.arange(length) for length in lengths]
        else:
            read = [np.array([length - 1 if self._causal else 0]) for length in lengths]
        batch = pack.with_positions(examples, layout, read)
        return {**batch, "targets": torch.from_numpy(np.stack([example["target"] for example in examples]))}

    def _closed(self, example: Example) -> Example:
        """Ending in the special tokens that end every row: of a row that was cut they take the last places."""
        ids, end = example["input_ids"], np.array(self._ending, np.int32)
        if len(ids) <= len(end) or np.array_equal(ids[-len(end) :], end):
            return example
        return {**example, "input_ids": np.concatenate([ids[: -len(end)], end])}

    # ----------------------------------------------------------------------------------------------------------- loss

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["targets"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over rows: cross-entropy of the class, mean over labels of the binary cross-entropies, or squared error."""
        from tunesmith.models.heads import task_heads

        logits = task_heads.score_logits(model, batch)
        targets = (
            batch["targets"].to(logits.device).nan_to_num(0.0)
        )  # of rows to be predicted the forward is tried too
        return self._losses(logits, targets, self._weights, self.config.label_smoothing).sum(), {}

    def _losses(self, logits: Any, targets: Any, weights: Any = None, smoothing: float = 0.0) -> Any:
        """(rows,); the plain loss is without ``weights`` (labels,) of classes and ``smoothing``."""
        import torch
        from torch.nn import functional

        if weights is not None:
            weights = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
        if self.problem == REGRESSION:
            return (logits[:, 0] - targets[:, 0].to(logits.dtype)).square()
        if self.problem == MULTI:
            each = functional.binary_cross_entropy_with_logits(
                logits, targets.to(logits.dtype), pos_weight=weights, reduction="none"
            )
            return each.mean(dim=1)
        return functional.cross_entropy(
            logits, targets[:, 0].long(), weight=weights, label_smoothing=smoothing, reduction="none"
        )

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Of each row: where it stands, its probabilities (of regression: the number), what is true of it, its plain loss."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            logits = task_heads.score_logits(model, batch)
            targets = batch["targets"].to(logits.device)
            known = ~targets.isnan().any(dim=1)
            losses = torch.full((len(logits),), float("nan"), dtype=logits.dtype, device=logits.device)
            if known.any():
                losses[known] = self._losses(logits[known], targets[known])
            scores = {SINGLE: lambda: logits.softmax(-1), MULTI: logits.sigmoid, REGRESSION: lambda: logits}[
                self.problem
            ]()
        return {
            "rows": batch["rows"],
            "scores": scores.cpu().numpy(),
            "targets": batch["targets"].cpu().numpy(),
            "losses": losses.cpu().double().numpy(),
        }

    def _gathered(
        self, records: Sequence[dict[str, Any]]
    ) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray, np.ndarray]:
        """(rows, scores, targets, losses) of all records, by row."""
        rows = [row for record in records for row in record["rows"]]
        order = sorted(range(len(rows)), key=lambda place: rows[place])
        parts = (
            np.concatenate([record[name] for record in records])[order]
            for name in ("scores", "targets", "losses")
        )
        scores, targets, losses = parts
        return [rows[place] for place in order], scores, targets, losses

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The mean loss of a row with its standard error, and the figures of :mod:`tunesmith.metrics.classes`."""
        _, scores, targets, losses = self._gathered(records)
        figures = {"eval_loss": float(losses.mean())}
        if len(losses) > 1:
            figures["eval_loss_stderr"] = float(losses.std(ddof=1) / len(losses) ** 0.5)
        found = self.measures(scores, targets).items()
        return figures | {
            f"eval_{name}": value for name, value in found if isinstance(value, float) and name != "baseline"
        }

    def measures(self, scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        """All figures of scores (rows, k) against targets (rows, k)."""
        from tunesmith.metrics import classes

        if self.problem == REGRESSION:
            return classes.regression_metrics(targets[:, 0], scores[:, 0])
        if self.problem == MULTI:
            return classes.multi_label_metrics(targets > 0.5, scores, self.labels, self.threshold)
        return classes.single_label_metrics(targets[:, 0].astype(int), scores, self.labels)

    def choose_threshold(self, records: Sequence[dict[str, Any]]) -> None:
        """With several labels: the threshold of the highest micro F1."""
        from tunesmith.metrics import classes

        if self.problem == MULTI:
            _, scores, targets, _ = self._gathered(records)
            self.threshold = classes.best_threshold(targets > 0.5, scores)

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        _, scores, targets, _ = self._gathered(records)
        return self.measures(scores, targets)

    def present(self, row: Labelled, answer: dict[str, Any]) -> dict[str, Any]:
        """label, labels or value, with the probability of each label."""
        name = {SINGLE: "label", MULTI: "labels", REGRESSION: "value"}[self.problem]
        said = {name: answer["prediction"]}
        if "probabilities" not in answer:
            return said
        if self.problem == SINGLE:
            said["score"] = answer["probabilities"][answer["prediction"]]
        return {**said, "probabilities": answer["probabilities"]}

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        rows, scores, targets, losses = self._gathered(records)
        return [
            {
                "row": list(row),
                **self._said(scores[place]),
                "gold": self._gold(targets[place]),
                "loss": None if np.isnan(losses[place]) else float(losses[place]),
            }
            for place, row in enumerate(rows)
        ]

    def _said(self, scores: np.ndarray) -> dict[str, Any]:
        if self.problem == REGRESSION:
            return {"prediction": float(scores[0])}
        chances = {name: float(chance) for name, chance in zip(self.labels, scores)}
        if self.problem == MULTI:
            return {
                "prediction": [name for name, chance in chances.items() if chance >= self.threshold],
                "probabilities": chances,
            }
        return {"prediction": self.labels[int(scores.argmax())], "probabilities": chances}

    def _gold(self, target: np.ndarray) -> Any:
        if np.isnan(target).any():
            return None
        if self.problem == REGRESSION:
            return float(target[0])
        if self.problem == MULTI:
            return [name for name, held in zip(self.labels, target) if held > 0.5]
        return self.labels[int(target[0])]
