"""Whether a run learnt its rows by heart: validation turned while training kept falling. A function of its records alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.runs import figure_format

KNOWS_JITTER = 8
"""Evaluations from which on a curve says how much it jitters: with fewer, a turn is a large part of what is measured."""
_NORMAL_MEDIAN = 0.6745  # median of |z| for a standard normal z


@dataclass(frozen=True)
class Verdict:
    """``step``: of the lowest validation loss. Losses of validation and of training there, and at the end."""

    step: int
    eval_loss: float
    last_step: int
    last_eval_loss: float
    train_loss: float
    last_train_loss: float
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def overfit(records: Sequence[dict[str, Any]]) -> Verdict | None:
    """The verdict over the records of ``metrics.jsonl``, or None where nothing of the kind can be said.

    It needs three evaluations, and the last two of them above the lowest one by more than

    - the standard error of an evaluation (``eval_loss_stderr``). All evaluations of a run read the same rows, so the error of
      their difference is smaller than that of each (equal from a correlation of 1/2 on);
    - the jitter of the curve from one evaluation to the next, which training itself brings, times 1.5 + sqrt(2 ln n): the
      lowest of n evaluations lies about sqrt(2 ln n) standard deviations low by chance. The jitter is the median of
      |second differences| / (0.6745 sqrt(6)): the standard deviation, for a smooth curve with independent noise. A single
      turn does not move a median.

    Training loss must have fallen meanwhile: the mean after the lowest evaluation is below the mean of as many records
    before it. (A run that got worse in both has diverged; that is not what this says.)
    """
    evaluations = [
        (
            int(one["step"]),
            one["eval_loss"],
            one["eval_loss_stderr"] if _is_finite(one, "eval_loss_stderr") else math.nan,
        )
        for one in records
        if one.get("kind") == "eval" and _is_finite(one, "eval_loss") and _is_finite(one, "step")
    ]
    if len(evaluations) < 3:
        return None
    lowest = min(range(len(evaluations)), key=lambda index: evaluations[index][1])
    step, best, _ = evaluations[lowest]
    if len(evaluations) - lowest < 3:
        return None
    margin = max(error for _, _, error in (evaluations[lowest], *evaluations[-2:]))
    margin = max(
        margin,
        (1.5 + math.sqrt(2 * math.log(len(evaluations)))) * _jitter([loss for _, loss, _ in evaluations]),
    )
    # Written so that a margin that is not a number, of a run without standard errors, says nothing.
    if not all(loss - best > margin for _, loss, _ in evaluations[-2:]):
        return None
    before, after = _train_losses(records, step)
    if not after < before:
        return None
    last_step, last, _ = evaluations[-1]
    text = (
        f"validation turned at step {step} while training kept falling: "
        f"eval loss {figure_format.number(best)} -> {figure_format.number(last)}, "
        f"train loss {figure_format.number(before)} -> {figure_format.number(after)}"
    )
    if step == 0:
        text += "; on held-out rows no trained model is better than the one it began with"
    else:
        text += f"; the model of step {step} is kept"
    return Verdict(step, best, last_step, last, before, after, text)


def _jitter(losses: list[float]) -> float:
    if len(losses) < KNOWS_JITTER:
        return 0.0
    return float(np.median(np.abs(np.diff(losses, 2))) / (_NORMAL_MEDIAN * math.sqrt(6)))


def _train_losses(records: Sequence[dict[str, Any]], step: int) -> tuple[float, float]:
    """(mean up to ``step``, mean after it) of the training loss, over as many records on both sides; NaN where there is none."""
    train = [
        one
        for one in records
        if one.get("kind") == "train" and _is_finite(one, "loss") and _is_finite(one, "step")
    ]
    after = [one["loss"] for one in train if one["step"] > step]
    before = [one["loss"] for one in train if one["step"] <= step][-len(after) :] if after else []
    if step == 0 and len(after) > 1:  # nothing was trained before: the first half against the second
        before, after = after[: len(after) // 2], after[len(after) // 2 :]
    return (
        (math.fsum(before) / len(before), math.fsum(after) / len(after))
        if before and after
        else (math.nan, math.nan)
    )


def _is_finite(record: dict[str, Any], key: str) -> bool:
    value = record.get(key)
    return figure_format.is_number(value) and math.isfinite(value)
