"""Figures of classification, of several labels at once, and of numbers: plain dicts that JSON can hold.

scikit-learn and SciPy compute them. Both are imported where they are used: they take a second to load.

Shares run from 0 to 1. What is not defined (the AUROC of a label that every row has, the correlation with a constant) is None.
A class that is neither true nor predicted anywhere has precision, recall and F1 of 0. ``macro_f1`` follows scikit-learn: of a
single label, the mean over the classes that are true or predicted at least once; of several labels, the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.errors import DataError

BINS = 15
"""Equal widths of confidence, as in Guo et al. 2017."""
POINTS = 100
"""At most so many points of a curve: more cannot be seen."""


def single(gold: Any, probabilities: Any, names: Sequence[str]) -> dict[str, Any]:
    """Figures of one class for each row: ``gold`` (n,) class ids, ``probabilities`` (n, k), ``names`` of the k classes.

    Returns accuracy, macro_f1, micro_f1, calibration_error, calibration (see :func:`calibration`; the confidence is the highest
    probability), baseline (the share of the most frequent class), per_class {name: {precision, recall, f1, support}} and
    confusion (k lists of k counts: a row of it is what is true, a column what is predicted). Of equally probable classes the
    first is predicted. Raises DataError without rows.
    """
    from sklearn.metrics import f1_score

    gold, probabilities = np.asarray(gold), np.asarray(probabilities, dtype=np.float64)
    _check(gold, probabilities, names, (len(probabilities),))
    predicted = probabilities.argmax(axis=1)
    right = predicted == gold
    bins = calibration(probabilities.max(axis=1), right)
    # scikit-learn's confusion_matrix warns where there is one class alone.
    confusion = np.bincount(gold * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "micro_f1": float(right.mean()),  # every row has one class and one prediction
        "calibration_error": calibration_error(bins),
        "baseline": float(confusion.sum(axis=1).max() / len(gold)),
        "per_class": _per_class(names, gold, predicted),
        "confusion": confusion.tolist(),
        "calibration": bins,
    }


def multi(gold: Any, probabilities: Any, names: Sequence[str], threshold: float = 0.5) -> dict[str, Any]:
    """Figures of any number of labels for each row: ``gold`` (n, k) of bools, ``probabilities`` (n, k) of each label alone.

    A label is predicted from ``threshold`` on. Returns micro_f1, macro_f1, exact_match (rows with all labels right), auroc (mean
    over the labels that some rows have and others have not), calibration_error and calibration (each label of each row is one
    forecast), threshold, baseline and baseline_labels (see :func:`most_frequent`), per_class {name: {precision, recall, f1,
    support, auroc}} and curves {name: [[recall, precision], ...]}, None where no row has the label. Raises DataError without
    rows.
    """
    from sklearn.metrics import f1_score

    gold, probabilities = np.asarray(gold, dtype=bool), np.asarray(probabilities)
    _check(gold, probabilities, names, probabilities.shape)
    predicted = probabilities >= threshold
    areas = [_auroc(gold[:, label], probabilities[:, label]) for label in range(len(names))]
    defined = [area for area in areas if area is not None]
    bins = calibration(probabilities.reshape(-1), gold.reshape(-1))
    constant = most_frequent(gold)
    # scikit-learn takes one column for a question of two classes; next to an empty column it stays a label.
    per_class = _per_class(names, *(np.pad(labels, ((0, 0), (0, 1))) for labels in (gold, predicted)))
    return {
        "micro_f1": float(f1_score(gold.reshape(-1), predicted.reshape(-1), zero_division=0)),
        "macro_f1": float(np.mean([figures["f1"] for figures in per_class.values()])),
        "exact_match": float((predicted == gold).all(axis=1).mean()),
        "auroc": float(np.mean(defined)) if defined else None,
        "calibration_error": calibration_error(bins),
        "threshold": float(threshold),
        "baseline": constant["micro_f1"],
        "baseline_labels": [names[label] for label in constant["labels"]],
        "per_class": {
            name: {**figures, "auroc": area} for (name, figures), area in zip(per_class.items(), areas)
        },
        "curves": {name: _curve(gold[:, label], probabilities[:, label]) for label, name in enumerate(names)},
        "calibration": bins,
    }


def best_threshold(gold: Any, probabilities: Any) -> float:
    """The threshold of the highest micro F1 of ``probabilities >= threshold`` against ``gold``, both (n, k).

    Every way to part the probabilities is tried, in O(n k log(n k)); the threshold lies in the middle between two neighbours
    (the last of them above 0), and of equally good ones nearest to 0.5. 0.5 itself when no other is better, and when a
    probability is nan. It is exact in the probabilities' own dtype, so that a comparison in it or in a wider one agrees.
    """
    from sklearn.metrics import confusion_matrix_at_thresholds

    truth, values = np.asarray(gold, dtype=bool).reshape(-1), np.asarray(probabilities).reshape(-1)
    if not truth.any() or np.isnan(values).any():
        return 0.5
    _, false_positives, false_negatives, hits, above = confusion_matrix_at_thresholds(truth, values)
    # The same fraction of whole numbers is the same float, so equally good thresholds compare as equal.
    scores = 2 * hits / (2 * hits + false_positives + false_negatives)
    if not scores.max() > max(scores[above >= 0.5][-1:], default=0):
        return 0.5
    below = np.append(above[1:], above.dtype.type(0))
    middle = below + (above - below) / 2
    middle = np.where(middle > below, middle, above)  # neighbours with no number between them
    best = middle[scores == scores.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def most_frequent(gold: Any) -> dict[str, Any]:
    """The best that can be said without reading: {"micro_f1", "labels"} of the labels which, predicted for every row, have the
    highest micro F1 against ``gold`` (n, k) of bools. ``labels`` are ids, the most frequent first.

    Of all sets of m labels the m most frequent ones are best, so only k sets are tried; of equally good ones the smallest is
    kept.
    """
    gold = np.asarray(gold, dtype=bool)
    counts = gold.sum(axis=0)
    if not counts.any():
        return {"micro_f1": 0.0, "labels": []}
    order = np.argsort(-counts, kind="stable")
    sizes = np.arange(1, len(counts) + 1)
    scores = 2 * counts[order].cumsum() / (sizes * len(gold) + counts.sum())
    best = int(scores.argmax())
    return {"micro_f1": float(scores[best]), "labels": order[: best + 1].tolist()}


def regression(gold: Any, predicted: Any) -> dict[str, float | None]:
    """mse, rmse, mae, r2 (1 - mse / variance of gold), pearson and spearman (of equal values their mean rank) of two (n,).

    r2 is None where all of gold is one number, the correlations where either is. Raises DataError without rows.
    """
    from scipy.stats import rankdata

    gold, predicted = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if gold.shape != predicted.shape or gold.ndim != 1:
        raise ValueError(f"gold {gold.shape} and predicted {predicted.shape} must be of one shape (n,)")
    _refuse_nothing(len(gold))
    errors = predicted - gold  # scikit-learn's errors refuse nan, which a run that diverged predicts
    mse = float(np.square(errors).mean())
    varies = bool(gold.min() < gold.max())
    return {
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - mse / float(gold.var()) if varies else None,
        "pearson": _correlation(gold, predicted),
        "spearman": _correlation(rankdata(gold), rankdata(predicted)),
    }


def calibration(confidence: Any, right: Any) -> list[dict[str, float]]:
    """{"confidence", "accuracy", "count"} of each of 15 bins of equal width that holds anything; both arguments are (n,), what is
    right 1, what is wrong 0, a tie a half.

    Bin m holds confidences in ((m - 1) / 15, m / 15], and 0 falls into the first (Guo et al. 2017, On Calibration of Modern
    Neural Networks, section 2). What is nan is in no bin.
    """
    # sklearn.calibration.calibration_curve has these bins, but no counts, no ties, and it refuses nan.
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    found = []
    for one in range(BINS):
        held = (place == one) & ~np.isnan(confidence)
        if held.any():
            found.append({
                "confidence": float(confidence[held].mean()),
                "accuracy": float(right[held].mean()),
                "count": int(held.sum()),
            })  # fmt: skip
    return found


def calibration_error(bins: Sequence[dict[str, float]]) -> float | None:
    """The expected calibration error of :func:`calibration`'s bins: the mean of |accuracy - confidence|, weighted by rows
    (Guo et al. 2017, eq. 3). None without any."""
    total = sum(one["count"] for one in bins)
    return (
        sum(abs(one["accuracy"] - one["confidence"]) * one["count"] for one in bins) / total
        if total
        else None
    )


def _check(gold: np.ndarray, probabilities: np.ndarray, names: Sequence[str], shape: tuple[int, ...]) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(names) or gold.shape != shape:
        raise ValueError(
            f"gold {gold.shape} and probabilities {probabilities.shape} do not fit {len(names)} names"
        )
    _refuse_nothing(len(gold))
    if gold.ndim == 1 and not (gold.min() >= 0 and gold.max() < len(names)):
        raise ValueError(f"class ids from {gold.min()} to {gold.max()}; expected 0 to {len(names) - 1}")


def _refuse_nothing(rows: int) -> None:
    if not rows:
        raise DataError("There is nothing to measure: no row has a label. Give rows whose labels are known.")


def _per_class(names: Sequence[str], gold: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return {name: {precision, recall, f1, support}} of class ids (n,) or of labels (n, k or more)."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(gold, predicted, labels=range(len(names)), zero_division=0)
    return {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(count)}
        for name, precision, recall, f1, count in zip(names, *columns)
    }


def _auroc(gold: np.ndarray, scores: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    if gold.all() or not gold.any() or np.isnan(scores).any():
        return None
    return float(roc_auc_score(gold, scores))


def _curve(gold: np.ndarray, scores: np.ndarray) -> list[list[float]] | None:
    """[recall, precision] from the lowest threshold to the highest, both ends kept."""
    from sklearn.metrics import precision_recall_curve

    if not gold.any() or np.isnan(scores).any():
        return None
    precision, recall, _ = precision_recall_curve(gold, scores, drop_intermediate=True)
    kept = np.unique(np.linspace(0, len(recall) - 1, POINTS).round().astype(int))
    return [[float(recall[place]), float(precision[place])] for place in kept]


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import pearsonr

    if a.min() == a.max() or b.min() == b.max():
        return None
    return float(pearsonr(a, b).statistic)
