"""Metrics of classification (one class or several labels a row) and of regression, as dicts for JSON.

Shares run from 0 to 1. An undefined metric is None: the AUROC of a label that every row has, the correlation
with a constant. A class that is neither true nor predicted has precision, recall and F1 of 0. ``macro_f1``
follows scikit-learn: with one class for each row it is the mean over the classes that are true or predicted
at least once; with several labels, the mean over all labels.

scikit-learn and SciPy are imported inside the functions, because they take a second to load.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

BINS = 15
"""Confidence bins of equal width (Guo et al. 2017)."""
POINTS = 100
"""Most points of a precision-recall curve; a chart cannot show more."""


def single_label_metrics(gold: ArrayLike, probabilities: ArrayLike, names: Sequence[str]) -> JsonObject:
    """Return the metrics of one class for each row.

    ``gold`` (n,) holds class ids, ``probabilities`` (n, k) those of the k classes ``names``. Of equally
    probable classes the first is predicted.

    Returns accuracy, macro_f1, micro_f1, calibration_error and calibration (the confidence is the highest
    probability), baseline (share of the most frequent class), per_class {name: {precision, recall, f1,
    support}} and confusion (k lists of k counts; rows are true classes, columns predicted ones). Raises
    DataError without rows.
    """
    from sklearn.metrics import f1_score

    gold, probabilities = np.asarray(gold), np.asarray(probabilities, dtype=np.float64)
    _check(gold, probabilities, names, (len(probabilities),))
    predicted = probabilities.argmax(axis=1)
    correct = predicted == gold
    bins = calibration(probabilities.max(axis=1), correct)
    # scikit-learn's confusion_matrix warns when there is only one class.
    confusion = np.bincount(gold * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    return {
        "accuracy": float(correct.mean()),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "micro_f1": float(correct.mean()),  # every row has one class and one prediction
        "calibration_error": calibration_error(bins),
        "baseline": float(confusion.sum(axis=1).max() / len(gold)),
        "per_class": _per_class(names, gold, predicted),
        "confusion": confusion.tolist(),
        "calibration": bins,
    }


def multi_label_metrics(
    gold: ArrayLike, probabilities: ArrayLike, names: Sequence[str], threshold: float = 0.5
) -> JsonObject:
    """Return the metrics of any number of labels for each row.

    ``gold`` (n, k) holds bools, ``probabilities`` (n, k) the probability of each label. A label is predicted
    when its probability is at least ``threshold``.

    Returns micro_f1, macro_f1, exact_match (share of rows with all labels correct), auroc (mean over the
    labels that some rows have and others lack), calibration_error and calibration (each label of each row is
    one forecast), threshold, baseline and baseline_labels (see :func:`most_frequent_labels`), per_class
    {name: {precision, recall, f1, support, auroc}} and curves {name: [[recall, precision], ...]}, None where
    no row has the label. Raises DataError without rows.
    """
    from sklearn.metrics import f1_score

    gold, probabilities = np.asarray(gold, dtype=bool), np.asarray(probabilities)
    _check(gold, probabilities, names, probabilities.shape)
    predicted = probabilities >= threshold
    aurocs = [_auroc(*columns) for columns in zip(gold.T, probabilities.T)]
    defined = [auroc for auroc in aurocs if auroc is not None]
    bins = calibration(probabilities.reshape(-1), gold.reshape(-1))
    constant = most_frequent_labels(gold)
    # scikit-learn reads a single column as two classes; next to an empty column it stays one label.
    per_class = _per_class(names, *(np.pad(labels, ((0, 0), (0, 1))) for labels in (gold, predicted)))
    return {
        "micro_f1": float(f1_score(gold.reshape(-1), predicted.reshape(-1), zero_division=0)),
        "macro_f1": float(np.mean([metrics["f1"] for metrics in per_class.values()])),
        "exact_match": float((predicted == gold).all(axis=1).mean()),
        "auroc": float(np.mean(defined)) if defined else None,
        "calibration_error": calibration_error(bins),
        "threshold": float(threshold),
        "baseline": constant["micro_f1"],
        "baseline_labels": [names[label] for label in constant["labels"]],
        "per_class": {name: {**per_class[name], "auroc": auroc} for name, auroc in zip(names, aurocs)},
        "curves": {name: _curve(*columns) for name, *columns in zip(names, gold.T, probabilities.T)},
        "calibration": bins,
    }


def best_threshold(gold: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the threshold with the highest micro F1 of ``probabilities >= threshold``; both arguments (n,
    k).

    The search tries every split of the probabilities, in O(n k log(n k)). A threshold is the midpoint of two
    neighbouring probabilities (or of the lowest one and 0); among equally good thresholds the one nearest to
    0.5 wins. Returns 0.5 when no threshold is better, and when a probability is nan. The threshold is exact
    in the dtype of ``probabilities``, so a comparison in that dtype or a wider one agrees.
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


def most_frequent_labels(gold: ArrayLike) -> JsonObject:
    """Return {"micro_f1", "labels"} of the best constant prediction for ``gold`` (n, k) of bools.

    ``labels`` are the ids of the labels which, predicted for every row, have the highest micro F1; the most
    frequent comes first. The best set of m labels holds the m most frequent ones, so only k sets are tried.
    Among equally good sets the smallest wins.
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


def regression_metrics(gold: ArrayLike, predicted: ArrayLike) -> dict[str, float | None]:
    """Return mse, rmse, mae, r2, pearson and spearman of two arrays (n,).

    r2 is 1 - mse / variance of gold, None where gold is constant. The correlations are None where either
    array is constant. Raises DataError without rows.
    """
    from scipy.stats import rankdata

    gold, predicted = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if gold.shape != predicted.shape or gold.ndim != 1:
        raise ValueError(f"gold {gold.shape} and predicted {predicted.shape}: expected one shape (n,)")
    _require_rows(len(gold))
    errors = predicted - gold  # scikit-learn refuses nan, which a diverged run predicts
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


def calibration(confidence: ArrayLike, correct: ArrayLike) -> list[dict[str, float]]:
    """Return {"confidence", "accuracy", "count"} of each of the 15 bins that holds at least one forecast.

    Both arguments have shape (n,). ``correct`` is 1 for a correct prediction, 0 for a wrong one, 0.5 for a
    tie. Bin m holds the confidences in ((m - 1) / 15, m / 15], and 0 falls into the first bin (Guo et al.
    2017, On Calibration of Modern Neural Networks, section 2). A nan falls into no bin.
    """
    # sklearn.calibration.calibration_curve has these bins, but no counts and no ties, and it refuses nan.
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    bin_numbers, bins = bin_of(confidence), []
    for number in range(BINS):
        members = (bin_numbers == number) & ~np.isnan(confidence)
        if count := int(members.sum()):
            means = float(confidence[members].mean()), float(correct[members].mean())
            bins.append({"confidence": means[0], "accuracy": means[1], "count": count})
    return bins


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return the number of the bin, from 0, of each confidence (n,)."""
    return np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")


def calibration_error(bins: Sequence[dict[str, float]]) -> float | None:
    """Return the expected calibration error of :func:`calibration`'s bins, None without bins.

    It is the mean of |accuracy - confidence|, weighted by rows (Guo et al. 2017, eq. 3).
    """
    if not bins:
        return None
    gaps = sum(abs(one["accuracy"] - one["confidence"]) * one["count"] for one in bins)
    return gaps / sum(one["count"] for one in bins)


def _check(gold: np.ndarray, probabilities: np.ndarray, names: Sequence[str], shape: tuple[int, ...]) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(names) or gold.shape != shape:
        shapes = f"gold {gold.shape} and probabilities {probabilities.shape}"
        raise ValueError(f"{shapes} do not match {len(names)} names")
    _require_rows(len(gold))
    if gold.ndim == 1 and not (gold.min() >= 0 and gold.max() < len(names)):
        raise ValueError(f"class ids from {gold.min()} to {gold.max()}; expected 0 to {len(names) - 1}")


def _require_rows(rows: int) -> None:
    if not rows:
        raise DataError("no row has a label: nothing to evaluate. Give rows whose labels are known.")


def _per_class(names: Sequence[str], gold: np.ndarray, predicted: np.ndarray) -> dict[str, JsonObject]:
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
    """Return [recall, precision] from the lowest threshold to the highest; both ends are kept."""
    from sklearn.metrics import precision_recall_curve

    if not gold.any() or np.isnan(scores).any():
        return None
    precision, recall, _ = precision_recall_curve(gold, scores, drop_intermediate=True)
    kept = np.unique(np.linspace(0, len(recall) - 1, POINTS).round().astype(int))
    return np.stack([recall[kept], precision[kept]], axis=1).astype(float).tolist()


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import pearsonr

    if a.min() == a.max() or b.min() == b.max():
        return None
    return float(pearsonr(a, b).statistic)
