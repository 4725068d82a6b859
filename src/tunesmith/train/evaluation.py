"""The objective's figures over held-out rows: the same for any memory budget and any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.data.batch.pack import Layout, to_device
from tunesmith.data.batch.step import Step
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.objectives import Objective, TaskHead
from tunesmith.train import distributed, forward_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: PreTrainedModel,
    objective: Objective,
    data: Encoded,
    layout: Layout,
    budget: int,
    device: torch.device,
    sets: Sequence[str] = (),
    choose_threshold: bool = False,
) -> dict[str, float]:
    """The objective's figures over all of ``data``, the same for any ``budget`` and any number of processes.

    ``sets``: names of the sources of ``data``. Each has figures of its own too (``eval_loss`` -> ``eval_NAME_loss``), which are
    those of a run with this set alone: its rows share no micro-batch with another's. ``choose_threshold``: let a task head
    choose on these rows what the saved model needs.
    """
    model.eval()
    parts = [np.flatnonzero(data.source == index) for index in range(len(sets))] or [np.arange(len(data))]
    of_parts = [
        _records(model, objective, Step(0, data, rows, objective.collate), layout, budget, device)
        for rows in parts
    ]
    everything = [record for part in of_parts for record in part]
    if choose_threshold and isinstance(objective, TaskHead):
        objective.choose_threshold(everything)
    figures = objective.summarise(everything)
    for name, part in zip(sets, of_parts):
        figures |= {
            f"eval_{name}_{key.removeprefix('eval_')}": value
            for key, value in objective.summarise(part).items()
        }
    return figures


def records(
    model: PreTrainedModel,
    objective: Objective,
    data: Encoded,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What the objective keeps of each micro-batch of ``data``."""
    model.eval()
    return _records(
        model, objective, Step(0, data, np.arange(len(data)), objective.collate), layout, budget, device
    )


def _records(
    model: PreTrainedModel,
    objective: Objective,
    step: Step,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What the objective keeps of each micro-batch of the examples of ``step``, from all processes."""

    @torch.no_grad()
    def run(places: Sequence[int]) -> dict[str, Any]:
        return objective.evaluate(model, to_device(step.collate(step.examples(places), layout), device))

    found = forward_batches.over_step(run, step, budget, layout, device, "evaluation")
    return distributed.gather([record for _, record in found])
