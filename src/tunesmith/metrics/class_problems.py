"""The three problem types of classification: one class, several labels, numbers.

Each has its figures, a baseline that predicts the same for every row, and its decisions. ``scores`` are
(n, k). ``targets`` are class ids or numbers (n, 1), or a 0 or 1 for each of k labels (n, k). A figure by row
is a function of sums over rows, given as each row's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.metrics import classes
from tunesmith.metrics.intervals import MOST_TERMS, Place, RowFigure

FIGURES = (
    "eval_loss", "eval_accuracy", "eval_macro_f1", "eval_micro_f1", "eval_calibration_error",
    "eval_exact_match", "eval_auroc",
    "eval_mse", "eval_rmse", "eval_mae", "eval_r2", "eval_pearson", "eval_spearman",
)  # fmt: skip
"""Figures of one class, of several labels, and of numbers."""


@dataclass(frozen=True)
class Terms:
    """A figure's terms of each row, (n, k). ``function`` and ``columns``: as in ``intervals.RowFigure``."""

    values: np.ndarray
    function: str = "ratio"
    columns: tuple[str, ...] = ()

    @classmethod
    def mean(cls, values: np.ndarray) -> Terms:
        """Return the terms of the mean of ``values`` (n,)."""
        return cls(np.stack([values, np.ones(len(values))], axis=1))

    def at(self, places: Sequence[Place]) -> RowFigure:
        rows = dict(zip(places, map(tuple, self.values.astype(float).tolist()), strict=True))
        return RowFigure(rows, self.function, self.columns)


FREQUENCIES = "the frequency of each as its probability"
"""The baseline of a cross-entropy, in words."""

Figures = dict[str, Terms]
"""Figures by name, without ``eval_``."""


def _by_place(places: Sequence[Place], figures: Mapping[str, Terms]) -> dict[str, RowFigure]:
    return {f"eval_{name}": terms.at(places) for name, terms in figures.items()}


@dataclass(frozen=True)
class Problem:
    """Functions of one problem type.

    ``measure``: return all figures. ``by_row``: return the terms of those that are functions of sums.
    ``constant``: return the scores of the best constant prediction, and that prediction in words.
    ``frequency_losses``: return the loss of each row (n,) if the probability of each class is its share of the
    rows (for a number: if the mean is predicted). ``decide``: turn scores into decisions (n, ...). ``always``:
    describe a model whose decision is the same for all rows. ``chance``: figures of a score that is the same
    for all rows, where they follow from their definition."""

    measure: Callable[[np.ndarray, np.ndarray, Sequence[str], float], JsonObject]
    by_row: Callable[[np.ndarray, np.ndarray, Sequence[str], float], Figures]
    constant: Callable[[np.ndarray, np.ndarray, Sequence[str]], tuple[np.ndarray, str]]
    frequency_losses: Callable[[np.ndarray], np.ndarray]
    decide: Callable[[np.ndarray, float], np.ndarray]
    always: Callable[[np.ndarray, Sequence[str]], str]
    best: tuple[str, Literal["min", "max"]]
    """The figure that chooses the best model."""
    chance: Mapping[str, float] = field(default_factory=dict)

    def row_figures(
        self,
        places: Sequence[Place],
        scores: np.ndarray,
        targets: np.ndarray,
        losses: np.ndarray,
        names: Sequence[str],
        threshold: float,
    ) -> dict[str, RowFigure]:
        return _by_place(
            places, {"loss": Terms.mean(losses), **self.by_row(targets, scores, names, threshold)}
        )

    def baselines(
        self,
        places: Sequence[Place],
        scores: np.ndarray,
        targets: np.ndarray,
        names: Sequence[str],
        threshold: float,
    ) -> dict[str, tuple[str, RowFigure]]:
        """Return, by figure, the rule that needs no model in words, and its figure by row.

        The rule is the best constant prediction, and for the loss the frequencies. The calibration error has
        none: that of the frequencies is 0."""
        constant, words = self.constant(targets, scores, names)
        figures = self.by_row(targets, constant, names, threshold)
        figures.pop("calibration_error", None)
        figures["loss"] = Terms.mean(self.frequency_losses(targets))
        of_loss = words if self.best[1] == "min" else FREQUENCIES
        return {
            name: (of_loss if name == "eval_loss" else words, figure)
            for name, figure in _by_place(places, figures).items()
        }

    def remarks(
        self, targets: np.ndarray, scores: np.ndarray, names: Sequence[str], threshold: float
    ) -> list[str]:
        """Return a sentence if the decision is the same for all rows although their targets differ."""
        decisions = self.decide(scores, threshold)
        if len(np.unique(targets, axis=0)) < 2 or len(np.unique(decisions, axis=0)) > 1:
            return []
        return [f"it predicts {self.always(decisions, names)} for all {len(scores):,} rows"]


def _single_by_row(
    targets: np.ndarray, scores: np.ndarray, names: Sequence[str], threshold: float
) -> Figures:
    gold, predicted = targets[:, 0].astype(int), scores.argmax(axis=1)
    right, one_hot = Terms.mean(gold == predicted), np.eye(len(names), dtype=bool)
    return {
        "accuracy": right,
        **_macro_f1(one_hot[gold], one_hot[predicted], names, "macro_f1"),
        "micro_f1": right,
        "calibration_error": calibration_terms(scores.max(axis=1), gold == predicted),
    }


def _multi_by_row(targets: np.ndarray, scores: np.ndarray, names: Sequence[str], threshold: float) -> Figures:
    gold, predicted = targets > 0.5, scores >= threshold
    hits, marks = (gold & predicted).sum(axis=1), gold.sum(axis=1) + predicted.sum(axis=1)
    return {
        "micro_f1": Terms(np.stack([2 * hits, marks], axis=1)),
        **_macro_f1(gold, predicted, names, "macro_f1_of_all"),
        "exact_match": Terms.mean((gold == predicted).all(axis=1)),
        "calibration_error": calibration_terms(scores, gold),
    }


def _macro_f1(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str], function: str) -> Figures:
    """``gold`` and ``predicted``: bool (n, k). Return no figure where the terms would take much memory."""
    if 2 * gold.size > MOST_TERMS:
        return {}
    terms = np.concatenate([2.0 * (gold & predicted), gold.astype(float) + predicted], axis=1)
    return {"macro_f1": Terms(terms, function, tuple(names))}


def f1_of_each(macro_f1: RowFigure | None) -> dict[str, RowFigure]:
    """Return the F1 of each class, as a ratio, from the rows of a macro F1; {} for numbers, which have none."""
    if macro_f1 is None:
        return {}
    count = len(macro_f1.columns)
    return {
        name: RowFigure({place: (row[index], row[count + index]) for place, row in macro_f1.rows.items()})
        for index, name in enumerate(macro_f1.columns)
    }


def calibration_terms(confidence: np.ndarray, correct: np.ndarray, rows: np.ndarray | None = None) -> Terms:
    """Return the terms of the calibration error. Both arguments are (n,), or (n, k) with k forecasts a row.

    ``rows``: the row of each forecast (n,), where rows differ in their number; (rows, 16) is returned."""
    each = confidence.reshape(-1).astype(np.float64)
    if rows is None:
        rows = np.repeat(np.arange(len(confidence)), each.size // max(1, len(confidence)))
    terms = np.zeros((int(rows.max(initial=-1)) + 1, classes.BINS + 1))
    np.add.at(terms, (rows, classes.bin_of(each)), each - correct.reshape(-1).astype(np.float64))
    terms[:, classes.BINS] = np.bincount(rows, minlength=len(terms))
    return Terms(terms, "calibration_error")


def _numbers_by_row(
    targets: np.ndarray, scores: np.ndarray, names: Sequence[str], threshold: float
) -> Figures:
    gold, predicted = targets[:, 0].astype(np.float64), scores[:, 0].astype(np.float64)
    errors = Terms.mean(np.square(predicted - gold))
    x, y, ones = gold - gold.mean(), predicted - predicted.mean(), np.ones(len(gold))  # sums stay small
    figures = {
        "mse": errors,
        "rmse": Terms(errors.values, "root"),
        "mae": Terms.mean(np.abs(predicted - gold)),
        "r2": Terms(np.stack([errors.values[:, 0], x, x * x, ones], axis=1), "r2"),
    }
    if y.any():
        figures["pearson"] = Terms(np.stack([x, y, x * x, y * y, x * y, ones], axis=1), "pearson")
    return figures


def _class_frequencies(targets: np.ndarray) -> np.ndarray:
    """Return the loss of each row (n,)."""
    ids = targets[:, 0].astype(int)
    return np.asarray(-np.log(np.bincount(ids)[ids] / len(ids)))


def _label_frequencies(targets: np.ndarray) -> np.ndarray:
    shares = targets.mean(axis=0, dtype=np.float64)
    of_true = np.where(targets > 0.5, shares, 1 - shares)  # never 0: the row itself is counted
    return np.asarray(-np.log(of_true).mean(axis=1))


def _most_frequent_class(
    targets: np.ndarray, scores: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, str]:
    return _constant(scores, [int(np.bincount(targets[:, 0].astype(int)).argmax())], names)


def _most_frequent_labels(
    targets: np.ndarray, scores: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, str]:
    return _constant(scores, classes.most_frequent_labels(targets > 0.5)["labels"], names)


def _constant(scores: np.ndarray, ids: Sequence[int], names: Sequence[str]) -> tuple[np.ndarray, str]:
    constant = np.zeros_like(scores)
    constant[:, list(ids)] = 1.0
    named = " and ".join(names[one] for one in ids) or "no label"
    return constant, f"always {named}, the most frequent"


def _mean(targets: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    return np.full_like(scores, targets.mean()), f"always the mean, {targets.mean():.4g}"


SINGLE_LABEL = Problem(
    measure=lambda targets, scores, names, _: classes.single_label_metrics(
        targets[:, 0].astype(int), scores, names
    ),
    by_row=_single_by_row,
    constant=_most_frequent_class,
    frequency_losses=_class_frequencies,
    decide=lambda scores, _: scores.argmax(axis=1),
    always=lambda decisions, names: f"one class only, {names[int(decisions[0])]},",
    best=("eval_accuracy", "max"),
)
MULTI_LABEL = Problem(
    measure=lambda targets, scores, names, threshold: classes.multi_label_metrics(
        targets > 0.5, scores, names, threshold
    ),
    by_row=_multi_by_row,
    constant=_most_frequent_labels,
    frequency_losses=_label_frequencies,
    decide=lambda scores, threshold: scores >= threshold,
    always=lambda decisions, names: "the same labels",
    best=("eval_micro_f1", "max"),
    chance={"eval_auroc": 0.5},
)
NUMBERS = Problem(
    measure=lambda targets, scores, names, _: dict(classes.regression_metrics(targets[:, 0], scores[:, 0])),
    by_row=_numbers_by_row,
    constant=_mean,
    frequency_losses=lambda targets: np.square(targets[:, 0] - targets.mean(dtype=np.float64)),
    decide=lambda scores, _: scores,
    always=lambda decisions, names: "the same number",
    best=("eval_loss", "min"),
    chance={"eval_pearson": 0.0, "eval_spearman": 0.0},
)


PROBLEMS = {
    "single_label_classification": SINGLE_LABEL,
    "multi_label_classification": MULTI_LABEL,
    "regression": NUMBERS,
}
"""The problem types, by the names of transformers' ``problem_type``."""
