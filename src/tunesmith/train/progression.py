"""The position of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progression:
    """The position of a run; a checkpoint holds all of it."""

    step: int = 0
    micro_batch_tokens: int = 0
    """The budget in use (0 = not chosen yet): measured, or lowered after memory ran out."""
    tokens: int = 0
    supervised: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    evaluation_due: bool = False
    """The evaluation of ``step`` is not finished: a reward failed in it."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last log."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """{metric: [sum, count]} since the last log; read from ``Job.sums`` for each checkpoint."""


def record_best(position: Progression, figure: float, direction: str, threshold: float) -> bool:
    """Record an evaluation's figure, and return whether it is the best so far.

    A figure that is not finite is never the best. Only a gain above ``threshold`` counts as an improvement
    for early stopping.
    """
    best = position.best
    gain = math.inf if best is None else (best - figure if direction == "min" else figure - best)
    if not math.isfinite(figure):
        gain = -math.inf
    position.without_improvement = 0 if gain > threshold else position.without_improvement + 1
    if gain > 0:
        position.best, position.best_step = figure, position.step
    return gain > 0
