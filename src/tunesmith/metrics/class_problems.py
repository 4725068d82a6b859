"""The three problem types of classification: one class, several labels, numbers.

Each has its figures, a baseline that predicts the same for every row, and its decisions. ``scores`` are
(n, k). ``targets`` are class ids or numbers (n, 1), or a 0 or 1 for each of k labels (n, k). A figure by row
is a ratio of two sums over rows, given as each row's term of either sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.metrics import classes
from tunesmith.metrics.intervals import Place, RowValues

FIGURES = (
    "eval_loss", "eval_accuracy", "eval_macro_f1", "eval_micro_f1", "eval_calibration_error",
    "eval_exact_match", "eval_auroc",
    "eval_mse", "eval_rmse", "eval_mae", "eval_r2", "eval_pearson", "eval_spearman",
)  # fmt: skip
"""Figures of one class, of several labels, and of numbers."""

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
"""Figure -> the rows' terms of its numerator and of its denominator, each (n,)."""


def _by_place(
    places: Sequence[Place], columns: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, RowValues]:
    """Return the two terms of each row by figure, with ``eval_`` before the figure's name."""
    return {
        f"eval_{name}": dict(zip(places, zip(above.astype(float).tolist(), below.astype(float).tolist())))
        for name, (above, below) in columns.items()
    }


@dataclass(frozen=True)
class Problem:
    """Functions of one problem type.

    ``measure``: return all figures. ``by_row``: return the terms of those that are ratios. ``constant``:
    return the scores of the best constant prediction, and that prediction in words. ``decide``: turn scores
    into decisions (n, ...). ``always``: describe a model whose decision is the same for all rows."""

    measure: Callable[[np.ndarray, np.ndarray, Sequence[str], float], JsonObject]
    by_row: Callable[[np.ndarray, np.ndarray, float], Columns]
    constant: Callable[[np.ndarray, np.ndarray, Sequence[str]], tuple[np.ndarray, str]]
    decide: Callable[[np.ndarray, float], np.ndarray]
    always: Callable[[np.ndarray, Sequence[str]], str]
    best: tuple[str, Literal["min", "max"]]
    """The figure that chooses the best model."""

    def row_figures(
        self,
        places: Sequence[Place],
        scores: np.ndarray,
        targets: np.ndarray,
        losses: np.ndarray,
        threshold: float,
    ) -> dict[str, RowValues]:
        loss = {"loss": (losses, np.ones(len(losses)))}
        return _by_place(places, loss | self.by_row(targets, scores, threshold))

    def baseline(
        self,
        places: Sequence[Place],
        scores: np.ndarray,
        targets: np.ndarray,
        names: Sequence[str],
        threshold: float,
    ) -> tuple[str, dict[str, RowValues], float | None]:
        """Return the constant prediction in words, its figures by row, its macro F1 (None for numbers)."""
        constant, words = self.constant(targets, scores, names)
        macro_f1 = self.measure(targets, constant, names, threshold).get("macro_f1")
        return words, _by_place(places, self.by_row(targets, constant, threshold)), macro_f1

    def remarks(
        self, targets: np.ndarray, scores: np.ndarray, names: Sequence[str], threshold: float
    ) -> list[str]:
        """Return a sentence if the decision is the same for all rows although their targets differ."""
        decisions = self.decide(scores, threshold)
        if len(np.unique(targets, axis=0)) < 2 or len(np.unique(decisions, axis=0)) > 1:
            return []
        return [f"it predicts {self.always(decisions, names)} for all {len(scores):,} rows"]


def _single_by_row(targets: np.ndarray, scores: np.ndarray, threshold: float) -> Columns:
    right = scores.argmax(axis=1) == targets[:, 0]
    return {"accuracy": (right, np.ones(len(right))), "micro_f1": (right, np.ones(len(right)))}


def _multi_by_row(targets: np.ndarray, scores: np.ndarray, threshold: float) -> Columns:
    gold, predicted = targets > 0.5, scores >= threshold
    hits, marks = (gold & predicted).sum(axis=1), gold.sum(axis=1) + predicted.sum(axis=1)
    exact = (gold == predicted).all(axis=1)
    return {"micro_f1": (2 * hits, marks), "exact_match": (exact, np.ones(len(exact)))}


def _numbers_by_row(targets: np.ndarray, scores: np.ndarray, threshold: float) -> Columns:
    errors = scores[:, 0].astype(np.float64) - targets[:, 0]
    ones = np.ones(len(errors))
    return {"mse": (np.square(errors), ones), "mae": (np.abs(errors), ones)}


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
    decide=lambda scores, threshold: scores >= threshold,
    always=lambda decisions, names: "the same labels",
    best=("eval_micro_f1", "max"),
)
NUMBERS = Problem(
    measure=lambda targets, scores, names, _: dict(classes.regression_metrics(targets[:, 0], scores[:, 0])),
    by_row=_numbers_by_row,
    constant=_mean,
    decide=lambda scores, _: scores,
    always=lambda decisions, names: "the same number",
    best=("eval_loss", "min"),
)


PROBLEMS = {
    "single_label_classification": SINGLE_LABEL,
    "multi_label_classification": MULTI_LABEL,
    "regression": NUMBERS,
}
"""The problem types, by the names of transformers' ``problem_type``."""
