"""Compute the reference log-probabilities of a saved preference model.

The reference is the policy that its training started from, which is loaded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Step
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.errors import ModelError
from tunesmith.evaluate.open_model import OpenedModel
from tunesmith.models.find import record
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load
from tunesmith.train import forward_batches
from tunesmith.train.reference import Reference, key_of


def attach_reference(
    opened: OpenedModel, rows: Encoded, given: str | Path | None, precision: str, budget: int
) -> Encoded:
    """Return ``rows`` with the ``reference_logps`` of the model ``given``.

    None = the model that training started from; raises ModelError if it is missing or changed. The trained
    model and the reference are in memory at the same time."""
    folder = locate(given) if given is not None else locate(_start(opened))
    start = replace(opened, network=load.load_model(folder), loaded_here=True)
    shortest = sorted(range(len(rows)), key=lambda row: rows.lengths[row])[:2]
    route, _ = start.prepare(precision, [rows[row] for row in shortest], rows.longest)
    step = Step(0, rows, np.arange(len(rows)), opened.objective.collate)

    @torch.no_grad()
    def run(places: Sequence[int]) -> list[list[float]]:
        batch = to_device(step.collate(step.examples(places), route.layout), start.device)
        return [values.tolist() for values in opened.objective.reference_logps(start.network, batch)]

    reference = Reference()
    for places, values in forward_batches.run_step(
        run, step, budget, route.layout, start.device, "reference"
    ):
        keys = [key_of(rows[int(step.rows[place])]) for place in places]
        reference.add(dict(zip(keys, values, strict=True)))
    reference.complete = True
    return rows.attach(reference.attach)


def _start(opened: OpenedModel) -> str:
    """Return the folder of the model that training started from. Raises ModelError unless it is unchanged."""
    start = opened.trained.get("start") or {}
    advice = "\n  Name the model that it started from with --reference MODEL, or see the run's report."
    needs = f"{opened.name} compares with the reference, the policy before the first step"
    if not start:
        raise ModelError(f"{needs}, and this model does not record it.{advice}")
    if not start["exact"]:
        raise ModelError(
            f"{needs}, which had random virtual tokens or new tokens of its own and was not saved.{advice}"
        )
    path = Path(start["path"])
    if not path.is_dir():
        raise ModelError(f"{needs}: {start['model']} in {path}, which is not there.{advice}")
    if record.file_hashes(path) != start["files"]:
        raise ModelError(f"{needs}: {start['model']} in {path}, whose weights have changed since.{advice}")
    return str(path)
