"""Steps made of rows of a data set. The rows of a step are a pure function of the recipe and the seed.

A user thinks in ``batch_size`` rows a step. The order depends neither on the number of processes nor on where
a run was interrupted, so a checkpoint need not keep it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import PACKED, PADDED, Layout
from tunesmith.data.batch.step import Collate, Plan, Step
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.store.epoch_order import epoch_order
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Epochs:
    """The ``data.batch.step.Source`` of rows."""

    data: Encoded
    collate: Collate
    batch_size: int
    seed: int
    shuffle: bool
    plan: Plan
    passes: float
    """Epochs of the plan, unless ``max_steps`` is given."""
    max_steps: int | None
    share_beginnings: bool
    """Steps know what their rows begin with together; see ``Step.sharing_beginnings``."""

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the examples of an epoch, in order; every epoch has the same number."""
        return _order(self, epoch)

    def rows(self, step: int) -> np.ndarray:
        """Indices of the examples of step ``step``, counted from 1."""
        epoch, place = divmod(step - 1, self.plan.steps_per_epoch)
        return self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def step(self, number: int) -> Step:
        step = Step(number, self.data, self.rows(number), self.collate)
        return step.sharing_beginnings() if self.share_beginnings else step

    def steps(self, start: int) -> Iterator[Step]:
        return (self.step(number) for number in range(start, self.plan.steps + 1))

    def preview(self, most: int) -> Sequence[Step]:
        steps = min(self.plan.steps, self.plan.steps_per_epoch)
        chosen = set(range(1, min(steps, most) + 1))
        if 1 < most < steps:
            for layout in (PADDED, PACKED, Layout(packed=True)):  # the run's layout is not known yet
                sizes = self.data.sizes(slice(None), layout)
                longest = int(np.argmax(sizes.tokens * sizes.rows))
                holds_it = (step for step in range(most + 1, steps + 1) if longest in self.rows(step))
                chosen.update(islice(holds_it, 1))
        return [self.step(number) for number in sorted(chosen)]

    def distinct(self) -> Step:
        read = np.zeros(len(self.data), np.bool_)
        for step in range(1, self.plan.steps + 1):
            read[self.rows(step)] = True
        return Step(0, self.data, np.flatnonzero(read), self.collate)

    def state(self) -> tuple[dict[str, torch.Tensor], JsonObject]:
        return {}, {}

    def load(self, tensors: Mapping[str, torch.Tensor], state: JsonObject) -> None:
        """Do nothing: the number of the next step determines its rows."""


@lru_cache(maxsize=2)
def _order(source: Epochs, epoch: int) -> np.ndarray:
    return epoch_order(source.data.source, source.data.weights, source.seed, epoch, source.shuffle)


def epochs(
    data: Encoded,
    collate: Collate,
    batch_size: int,
    seed: int,
    shuffle: bool,
    passes: float,
    max_steps: int | None,
    share_beginnings: bool = False,
) -> Epochs:
    """Plan a run over ``data``: ``passes`` epochs, or ``max_steps`` steps."""
    rows = len(epoch_order(data.source, data.weights, seed, 0, shuffle))
    per_epoch = math.ceil(rows / batch_size)
    steps = max_steps or max(1, math.ceil(per_epoch * passes - 1e-9))
    plan = Plan(steps, per_epoch)
    return Epochs(data, collate, batch_size, seed, shuffle, plan, passes, max_steps, share_beginnings)
