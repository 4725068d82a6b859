"""Classification of a text or a pair of texts: one class of several, any number of labels, or a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import labels, texts
from tunesmith.data.encode.labels import MULTI, REGRESSION, SINGLE, Names, Survey
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Labelled
from tunesmith.errors import RecipeError
from tunesmith.metrics import classes
from tunesmith.metrics.class_problems import FIGURES, PROBLEMS, f1_of_each
from tunesmith.metrics.intervals import RowFigure
from tunesmith.models import network
from tunesmith.objectives import Baseline, Batch, Example, JsonObject, Layout, Metrics, Overlong, Traits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class Config(objectives.Config):
    problem_type: Problem | None = Field(
        None,
        description="default: from the labels (lists of labels, numbers with fractions, else one class a row)",
    )
    labels: Names | None = Field(
        None, min_length=1, description="names of the classes, by id; default: those of the training rows"
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="balanced = every class has the same total weight (with several labels: rows with a label as much as rows "
        "without it); or {label: weight}",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    pooling: Literal["mean"] | None = Field(
        None,
        description="mean = average over all tokens; default: an encoder's first token, a decoder's last",
    )
    overlong: Overlong = Field("error", description="what happens to a row above max_length")

    @model_validator(mode="after")
    def _check_problem(self) -> Config:
        labels.refuse_repeats(self.labels)
        if self.problem_type == REGRESSION:
            for key in ("labels", "class_weights", "label_smoothing"):
                if dict(self)[key]:
                    raise ValueError(
                        f"{key} applies to classes only, and problem_type is regression. Leave out one of the two"
                    )
        if self.problem_type == MULTI and self.label_smoothing:
            raise ValueError(
                "label_smoothing applies to single-label classification only, and problem_type is multi_label_classification"
            )
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=1) <= 0:
            raise ValueError("class_weights: expected numbers above 0")
        return self


class Objective(objectives.TaskHead):
    config: Config
    traits = Traits(
        rows=(Labelled,),
        head="score",
        figures=FIGURES,
        starter={"path": "builtin:classify"},
        assumed=True,
        single_label_keys=("label_smoothing",),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.threshold = 0.5
        """With several labels: the probability from which a label is predicted."""
        self._closing_tokens: tuple[int, ...] = ()
        self._pooling: str | None = config.pooling
        self._reads_all_tokens = False
        self._template = texts.PAIR_TEMPLATE
        self._weights: np.ndarray | None = None
        self._set_labels(config.problem_type, config.labels)

    def _set_labels(self, problem: str | None, names: list[str] | None) -> None:
        """Set problem and labels, and with them the figure that chooses the best model."""
        self.facts |= {"problem": problem, "labels": names}
        self.traits = replace(self.traits, best=PROBLEMS[self.problem].best)

    @property
    def problem(self) -> str:
        return str(self.facts["problem"] or SINGLE)

    @property
    def labels(self) -> list[str]:
        return list(self.facts["labels"] or [])

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        self._closing_tokens = tuple(special_ends(tokenizer)[1])
        if self.has_head:
            self.saved = {
                "problem": config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE),
                "labels": [config.id2label[number] for number in range(config.num_labels)],
                **self.saved,
            }
            self.threshold = float(self.saved.get("threshold", 0.5))
            self._pooling = self._pooling or self.saved.get("pooling")
            self._template = self.saved.get("pair_template", self._template)
        self._reads_all_tokens = "mean" in (self._pooling, network.pooling(config))
        if self._pooling == "mean":
            self.notes.append(
                "pooling: mean is a feature of tunesmith: tunesmith's load, evaluate and predict apply it; transformers' own "
                "class reads one token, so its answers differ"
            )
        self.facts |= {"causal": self.causal, "pad": self.pad, "template": self._template}

    def restore_labels(self) -> None:
        super().restore_labels()
        self._set_labels(self.saved["problem"], self.saved["labels"])

    def scan(self, rows: Iterable[object]) -> None:
        if self.restored:
            return
        if self.config.labels and self.config.problem_type and self.config.class_weights != "balanced":
            labels.check_names(self.labels, self.problem)
            self._weigh_classes(None)
            return
        survey = labels.survey(row for row in rows if isinstance(row, Labelled))
        problem = self.config.problem_type or survey.problem
        names = [] if problem == REGRESSION else self.config.labels or labels.sort_names(survey.counts)
        if not self.config.problem_type:
            self.notes += labels.numeric_label_notes(problem, survey)
        self.notes += [
            f"{' and '.join(map(ascii, group[:5]))} look the same but are different classes. If they are one class, write them "
            "the same way"
            for group in labels.similar_names(names)
        ]
        if problem != REGRESSION:
            labels.check_names(names, problem)
        if self.has_head and problem == self.saved["problem"] and set(names) == set(self.saved["labels"]):
            names = self.saved["labels"]  # the trained head is used further, so its ids stay
        self._set_labels(problem, names)
        if problem != SINGLE and self.config.label_smoothing:
            raise RecipeError(
                f"objective.label_smoothing applies to single-label classification only, and this is {problem}. Leave it out."
            )
        self._weigh_classes(survey)
        self.notes += labels.label_notes(problem, names, survey)

    def _weigh_classes(self, survey: Survey | None) -> None:
        """Set the class weights. ``balanced``: rows / (classes * rows of the class), whose mean over the rows
        is 1; with several labels rows without / rows with the label, which is what torch suggests for
        ``pos_weight``."""
        chosen, names = self.config.class_weights, self.labels
        if chosen is None:
            return
        if self.problem == REGRESSION:
            raise RecipeError(
                "objective.class_weights applies to classes only, and the labels are numbers. Leave it out."
            )
        if isinstance(chosen, dict):
            for name in chosen:
                if name not in names:
                    expected, _, fix = labels.unknown_label(name, names)
                    raise RecipeError(f"objective.class_weights.{name}: expected {expected}. {fix}")
            self._weights = np.array([chosen.get(name, 1.0) for name in names])
            return
        assert survey is not None
        with_label = np.array([max(1, survey.counts[name]) for name in names])
        if self.problem == MULTI:
            self._weights = np.maximum(1, survey.rows - with_label) / with_label
        else:
            self._weights = survey.rows / (len(names) * with_label)

    def head_config(self) -> JsonObject:
        saved = {"pair_template": self._template, "threshold": self.threshold}
        if self._pooling:
            saved["pooling"] = self._pooling
        return self.label_config(self.labels or ["LABEL_0"], saved, problem_type=self.problem)

    def encode(self, rows: Sequence[Labelled], tokenizer: Tokenizer) -> list[list[Example]]:
        examples = texts.encode([(row.text, row.text_pair) for row in rows], tokenizer, self._template)
        for index, (row, example) in enumerate(zip(rows, examples)):
            ids = example["input_ids"]
            if not len(ids):
                fix = "Write something, or delete the row."
                raise RowFault(index, "a text with at least one token", repr(row.text[:40]), fix, "text")
            if self.pad is not None and ids[-1] == self.pad:
                expected = "text that does not end in the padding token"
                raise RowFault(index, expected, repr(tokenizer.pad_token), "Remove it.", "text")
            example["target"] = self._target(row, index)
        return [[example] for example in examples]

    def check_labels(self, row: Labelled, held_out: bool) -> None:
        self._target(row, 0)

    def _target(self, row: Labelled, index: int) -> np.ndarray:
        """float32: class id or number (1,), or 0 and 1 for each label; NaN where the row has none."""
        names = self.labels
        if row.labels is None and row.label is None:
            return np.full(len(names) if self.problem == MULTI else 1, np.nan, np.float32)
        if self.problem == MULTI:
            single = () if row.label is None else (labels.name_of(row.label),)
            field = "label" if single else "labels"
            target = np.zeros(len(names), np.float32)
            for name in single or row.labels or ():
                target[self._label_id(name, index, field)] = 1.0
            return target
        if row.label is None:
            fix = "Set objective.problem_type=multi_label_classification."
            raise RowFault(index, "one label", f"a list of {len(row.labels or ())}", fix, "labels")
        if self.problem == REGRESSION:
            value = labels.as_number(row.label)
            if value is None:
                fix = "Write a number of at most 1e18, or delete the row."
                raise RowFault(index, "a number", repr(row.label), fix, "label")
            return np.array([value], np.float32)
        return np.array([self._label_id(labels.name_of(row.label), index, "label")], np.float32)

    def _label_id(self, name: str, index: int, field: str) -> int:
        if name not in self.labels:
            raise RowFault(index, *labels.unknown_label(name, self.labels), field)
        return self.labels.index(name)

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """``targets`` (rows, k) float32; ``positions``: the token read in each row, or all of them."""
        import torch

        if self._closing_tokens:
            examples = [self._close(example) for example in examples]
        lengths = [len(example["input_ids"]) for example in examples]
        if self._reads_all_tokens:
            read = [np.arange(length) for length in lengths]
        else:
            read = [np.array([length - 1 if self.causal else 0]) for length in lengths]
        batch = pack.with_positions(examples, layout, read)
        return {**batch, "targets": torch.from_numpy(np.stack([example["target"] for example in examples]))}

    def _close(self, example: Example) -> Example:
        """Put the closing special tokens in the last positions of a row that was cut."""
        ids, closing = example["input_ids"], np.array(self._closing_tokens, np.int32)
        if len(ids) <= len(closing) or np.array_equal(ids[-len(closing) :], closing):
            return example
        return {**example, "input_ids": np.concatenate([ids[: -len(closing)], closing])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over rows: cross-entropy, mean over labels of binary cross-entropies, or squared error."""
        from tunesmith.models.heads import task_heads

        logits = task_heads.score_logits(model, batch)
        # rows without a label go through the parity check of the fast path before a prediction
        targets = batch["targets"].to(logits.device).nan_to_num(0.0)
        return self._losses(logits, targets, self._weights, self.config.label_smoothing).sum(), {}

    def _losses(
        self, logits: Tensor, targets: Tensor, weights: np.ndarray | None = None, smoothing: float = 0.0
    ) -> Tensor:
        """(rows,). ``weights`` of classes and ``smoothing`` apply in training, not in ``eval_loss``."""
        import torch
        from torch.nn import functional

        by_class = (
            None if weights is None else torch.tensor(weights, dtype=logits.dtype, device=logits.device)
        )
        if self.problem == REGRESSION:
            return (logits[:, 0] - targets[:, 0].to(logits.dtype)).square()
        if self.problem == MULTI:
            each = functional.binary_cross_entropy_with_logits(
                logits, targets.to(logits.dtype), pos_weight=by_class, reduction="none"
            )
            return each.mean(dim=1)
        return functional.cross_entropy(
            logits, targets[:, 0].long(), weight=by_class, label_smoothing=smoothing, reduction="none"
        )

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """For each row: its place in the data, its probabilities (regression: the number), its target, and
        its unweighted loss, NaN where the target is not known."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            logits = task_heads.score_logits(model, batch)
            targets = batch["targets"].to(logits.device)
            known = ~targets.isnan().any(dim=1)
            losses = torch.full((len(logits),), float("nan"), dtype=logits.dtype, device=logits.device)
            if known.any():
                losses[known] = self._losses(logits[known], targets[known])
            scores = logits
            if self.problem != REGRESSION:
                scores = logits.softmax(-1) if self.problem == SINGLE else logits.sigmoid()
        return {
            "rows": batch["rows"],
            "scores": scores.cpu().numpy(),
            "targets": batch["targets"].cpu().numpy(),
            "losses": losses.cpu().double().numpy(),
        }

    def _joined(
        self, records: Sequence[JsonObject]
    ) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray, np.ndarray]:
        """(rows, scores, targets, losses) of all records, in the order of rows."""
        rows = [row for record in records for row in record["rows"]]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        scores, targets, losses = (
            np.concatenate([record[name] for record in records])[order]
            for name in ("scores", "targets", "losses")
        )
        return [rows[index] for index in order], scores, targets, losses

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Mean loss of a row with its standard error, and :mod:`tunesmith.metrics.classes`."""
        losses = self._joined(records)[3]
        figures = {"eval_loss": float(losses.mean())}
        if len(losses) > 1:
            figures["eval_loss_stderr"] = float(losses.std(ddof=1) / len(losses) ** 0.5)
        measured = self.details(records) | {"baseline": None}
        return figures | {
            f"eval_{name}": value for name, value in measured.items() if isinstance(value, float)
        }

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        return PROBLEMS[self.problem].row_figures(*self._joined(records), self.labels, self.threshold)

    def group_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        return f1_of_each(self.row_figures(records).get("eval_macro_f1"))

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the figures of the most frequent class or labels, or of the mean; the loss of frequencies."""
        problem = PROBLEMS[self.problem]
        rules = problem.baselines(*self._joined(records)[:3], self.labels, self.threshold)
        found = {name: Baseline("the same for all rows", value) for name, value in problem.chance.items()}
        return found | {name: Baseline.of_rows(*rule) for name, rule in rules.items()}

    def remarks(self, records: Sequence[JsonObject]) -> list[str]:
        _, scores, targets, _ = self._joined(records)
        return PROBLEMS[self.problem].remarks(targets, scores, self.labels, self.threshold)

    def choose_threshold(self, records: Sequence[JsonObject]) -> None:
        """With several labels: choose the threshold with the highest micro F1."""
        if self.problem == MULTI:
            _, scores, targets, _ = self._joined(records)
            self.threshold = classes.best_threshold(targets > 0.5, scores)

    def details(self, records: Sequence[JsonObject]) -> JsonObject:
        _, scores, targets, _ = self._joined(records)
        return PROBLEMS[self.problem].measure(targets, scores, self.labels, self.threshold)

    def present(self, row: Labelled, answer: JsonObject) -> JsonObject:
        """label, labels or value; for classes with the probability of each."""
        name = {SINGLE: "label", MULTI: "labels", REGRESSION: "value"}[self.problem]
        shown = {name: answer["prediction"]}
        if "probabilities" not in answer:
            return shown
        if self.problem == SINGLE:
            shown["score"] = answer["probabilities"][answer["prediction"]]
        return {**shown, "probabilities": answer["probabilities"]}

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        return [
            {
                "row": list(row),
                **self._predict(scores),
                "gold": self._gold(target),
                "loss": None if np.isnan(loss) else float(loss),
            }
            for row, scores, target, loss in zip(*self._joined(records), strict=True)
        ]

    def _predict(self, scores: np.ndarray) -> JsonObject:
        if self.problem == REGRESSION:
            return {"prediction": float(scores[0])}
        probabilities = {name: float(score) for name, score in zip(self.labels, scores)}
        if self.problem == MULTI:
            prediction = [
                name for name, probability in probabilities.items() if probability >= self.threshold
            ]
            return {"prediction": prediction, "probabilities": probabilities}
        return {"prediction": self.labels[int(scores.argmax())], "probabilities": probabilities}

    def _gold(self, target: np.ndarray) -> object:
        if np.isnan(target).any():
            return None
        if self.problem == REGRESSION:
            return float(target[0])
        if self.problem == MULTI:
            return [name for name, value in zip(self.labels, target) if value > 0.5]
        return self.labels[int(target[0])]
