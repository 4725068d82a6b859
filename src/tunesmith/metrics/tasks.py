"""Tasks that a user names, ``task: summarise`` in a recipe or ``--task`` of a command: which metrics of answers count.

A task changes no training. It chooses the metrics of generated answers where none are named, and which of them
comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Task: TypeAlias = Literal["summarise", "translate"]

METRICS: dict[Task, tuple[str, ...]] = {
    "summarise": ("rougeL", "rouge1", "rouge2", "length", "stopped", "repetition"),
    "translate": ("chrf", "bleu", "exact_match", "length", "stopped", "repetition"),
}
"""Metrics of a task. The first one decides a comparison whose models have no common loss."""


def metrics_of(task: Task | None) -> Sequence[str]:
    """Return the metrics of a task, all for None."""
    from tunesmith.metrics import answer_metrics  # not for the recipe, which needs the names of tasks alone

    return METRICS[task] if task else list(answer_metrics.table())
