"""Steps made of the rows of a data set. Which rows make up which step is a pure function of the recipe and the seed.

A user thinks in ``batch_size`` rows a step. The order depends neither on how many processes there are nor on where a run was
interrupted, so nothing needs to be kept in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.data.batch.pack import PACKED, PADDED, Layout
from tunesmith.data.batch.step import Collate, Plan, Step
from tunesmith.data.store import epoch_order
from tunesmith.data.store.encoded_rows import Encoded


@dataclass(frozen=True)
class Epochs:
    """The ``data.batch.step.Source`` of rows; ``rows(step)`` are the indices of a step's examples."""

    data: Encoded
    collate: Collate
    batch_size: int
    seed: int
    shuffle: bool
    plan: Plan

    def rows(self, step: int) -> np.ndarray:
        """Indices of the examples of step ``step``, counted from 1."""
        epoch, place = divmod(step - 1, self.plan.steps_per_epoch)
        order = _order(self, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def step(self, number: int) -> Step:
        return Step(number, self.data, self.rows(number), self.collate)

    def steps(self, start: int) -> Iterator[Step]:
        return (self.step(number) for number in range(start, self.plan.steps + 1))

    def preview(self, most: int) -> Sequence[Step]:
        steps = min(self.plan.steps, self.plan.steps_per_epoch)
        looked_at = list(range(1, min(steps, most) + 1))
        if 1 < most < steps:
            for layout in (
                PADDED,
                PACKED,
                Layout(packed=True),
            ):  # nobody knows yet which one the run will take
                lengths, several = self.data.sizes(slice(None), layout)
                longest = int(np.argmax(lengths * several))
                looked_at += [step for step in range(most + 1, steps + 1) if longest in self.rows(step)][:1]
            looked_at = sorted(set(looked_at))
        return [self.step(number) for number in looked_at]

    def distinct(self) -> Step:
        read = np.zeros(len(self.data), np.bool_)
        for step in range(1, self.plan.steps + 1):
            read[self.rows(step)] = True
        return Step(0, self.data, np.flatnonzero(read), self.collate)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    def load(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """The number of the next step says everything."""

    def __hash__(self) -> int:
        return id(self.data)


@lru_cache(maxsize=2)
def _order(epochs: Epochs, epoch: int) -> np.ndarray:
    return epoch_order.epoch_order(
        epochs.data.source, epochs.data.weights, epochs.seed, epoch, epochs.shuffle
    )


def epochs(
    data: Encoded,
    collate: Collate,
    batch_size: int,
    seed: int,
    shuffle: bool,
    passes: float,
    max_steps: int | None,
) -> Epochs:
    """Lay out a run over ``data``: ``passes`` epochs, or ``max_steps`` steps."""
    rows = len(epoch_order.epoch_order(data.source, data.weights, seed, 0, shuffle))
    per_epoch = math.ceil(rows / batch_size)
    steps = max_steps or max(1, math.ceil(per_epoch * passes - 1e-9))
    return Epochs(data, collate, batch_size, seed, shuffle, Plan(steps, per_epoch))
