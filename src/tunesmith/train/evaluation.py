"""The objective's figures over held-out rows: the same for any memory budget and any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.store.encoded import Encoded
from tunesmith.objectives import Objective
from tunesmith.train import distributed, fitting


def evaluate(
    model: Any,
    objective: Objective,
    data: Encoded,
    packed: bool,
    budget: int,
    device: torch.device,
    sets: Sequence[str] = (),
    tune: bool = False,
) -> dict[str, float]:
    """The objective's figures over all of ``data``, the same for any ``budget`` and any number of processes.

    ``sets``: names of the sources of ``data``. Each has figures of its own too (``eval_loss`` -> ``eval_NAME_loss``), which are
    those of a run with this set alone: its rows share no micro-batch with another's. ``tune``: let the objective choose on these
    rows what the saved model needs.
    """
    model.eval()
    parts = [np.flatnonzero(data.source == index) for index in range(len(sets))] or [np.arange(len(data))]
    of_parts = [_records(model, objective, data, rows, packed, budget, device) for rows in parts]
    everything = [record for part in of_parts for record in part]
    if tune:
        objective.tune(everything)
    figures = objective.summarise(everything)
    for name, part in zip(sets, of_parts):
        figures |= {f"eval_{name}_{key.removeprefix('eval_')}": value for key, value in objective.summarise(part).items()}
    return figures


def records(
    model: Any, objective: Objective, data: Encoded, packed: bool, budget: int, device: torch.device
) -> list[dict[str, Any]]:
    """What the objective keeps of each micro-batch of ``data``."""
    model.eval()
    return _records(model, objective, data, np.arange(len(data)), packed, budget, device)


def _records(
    model: Any, objective: Objective, data: Encoded, rows: np.ndarray, packed: bool, budget: int, device: torch.device
) -> list[dict[str, Any]]:
    """What the objective keeps of each micro-batch of ``rows``, from all processes."""
    order = rows[np.argsort(-data.lengths[rows], kind="stable")]
    state = distributed.state()
    mine = order[state.process_index :: state.num_processes]

    @torch.no_grad()
    def run(places: list[int]) -> dict[str, Any]:
        batch = objective.collate([data[int(row)] for row in mine[places]], packed)
        return objective.evaluate(model, to_device(batch, device))

    def name(place: int) -> str:
        return f"evaluation of {data.where(int(mine[place]))}"

    sizes = data.sizes(mine, packed, objective.shared)
    return distributed.gather(fitting.in_groups(run, sizes, budget, packed, device, name))
