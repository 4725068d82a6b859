"""Detection of overfitting from a run's records: validation loss turned while training loss kept falling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import is_finite, number

KNOWS_JITTER = 8
"""Fewest evaluations for an estimate of jitter: in a shorter curve the rise itself would dominate it."""
_NORMAL_MEDIAN = 0.6745  # median of |z| for a standard normal z


@dataclass(frozen=True)
class Verdict:
    """The validation loss was lowest at ``step``. Losses of validation and training there, and at the end."""

    step: int
    eval_loss: float
    last_step: int
    last_eval_loss: float
    train_loss: float
    last_train_loss: float
    text: str

    def as_dict(self) -> JsonObject:
        return asdict(self)


def detect(records: Sequence[JsonObject]) -> Verdict | None:
    """Return the verdict over the records of ``metrics.jsonl``, None if they do not show overfitting.

    At least three evaluations are needed. The last two must exceed the lowest one by more than both of these:

    - the standard error of an evaluation (``eval_loss_stderr``). All evaluations of a run read the same rows,
      so the error of their difference is smaller than that of each (equal from a correlation of 1/2 on);
    - the jitter of the curve between evaluations times 1.5 + sqrt(2 ln n): the lowest of n evaluations is
      about sqrt(2 ln n) standard deviations low by chance. The jitter is the median of |second differences| /
      (0.6745 sqrt(6)): the standard deviation, for a smooth curve with independent noise. A single turn does
      not move a median.

    Training loss must have fallen meanwhile: its mean after the lowest evaluation is below the mean of as
    many records before it. (A run whose losses both rose has diverged, which is not overfitting.)
    """
    evals = _select_finite(records, "eval", "eval_loss")
    losses = [one["eval_loss"] for one in evals]
    lowest = losses.index(min(losses)) if losses else 0
    if len(losses) - lowest < 3:
        return None
    best, step = losses[lowest], int(evals[lowest]["step"])
    compared = (evals[lowest], *evals[-2:])
    error = max(
        one["eval_loss_stderr"] if is_finite(one, "eval_loss_stderr") else math.nan for one in compared
    )
    margin = max(error, (1.5 + math.sqrt(2 * math.log(len(losses)))) * _jitter(losses))
    # False also when the margin is nan, which it is for a run without standard errors.
    if not all(loss - best > margin for loss in losses[-2:]):
        return None
    before, after = _train_losses(records, step)
    if not after < before:
        return None
    last_step, last = int(evals[-1]["step"]), losses[-1]
    kept = f"the model of step {step} is kept" if step else "no trained model is better than the initial one"
    text = (
        f"validation turned at step {step} while training kept falling: eval loss {number(best)} -> {number(last)}, "
        f"train loss {number(before)} -> {number(after)}; {kept}"
    )
    return Verdict(step, best, last_step, last, before, after, text)


def _jitter(losses: list[float]) -> float:
    if len(losses) < KNOWS_JITTER:
        return 0.0
    return float(np.median(np.abs(np.diff(losses, 2))) / (_NORMAL_MEDIAN * math.sqrt(6)))


def _train_losses(records: Sequence[JsonObject], step: int) -> tuple[float, float]:
    """Mean training loss up to ``step`` and after it, over equally many records; NaN without records."""
    train = _select_finite(records, "train", "loss")
    after = [one["loss"] for one in train if one["step"] > step]
    before = [one["loss"] for one in train if one["step"] <= step][-len(after) :] if after else []
    if step == 0 and len(after) > 1:  # no training before step 0: compare the first half with the second
        before, after = after[: len(after) // 2], after[len(after) // 2 :]
    if not (before and after):
        return math.nan, math.nan
    return math.fsum(before) / len(before), math.fsum(after) / len(after)


def _select_finite(records: Sequence[JsonObject], kind: str, key: str) -> list[JsonObject]:
    of_kind = (one for one in records if one.get("kind") == kind)
    return [one for one in of_kind if is_finite(one, key) and is_finite(one, "step")]
