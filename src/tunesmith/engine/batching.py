"""Which rows make up which optimiser step, and how a step is cut into micro-batches. Pure functions of the recipe and the seed.

A user thinks in ``batch_size`` rows per step; ``micro_batch_tokens`` only says how many tokens are in memory at once. Neither the
order nor the split depends on how many processes there are, nor on where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tunesmith.data import mix
from tunesmith.data.encoded import Encoded


@dataclass(frozen=True)
class Plan:
    """The steps of a run: ``steps_per_epoch`` (the last may be short), ``steps`` in all."""

    data: Encoded
    batch_size: int
    seed: int
    shuffle: bool
    steps_per_epoch: int
    steps: int

    def rows(self, step: int) -> np.ndarray:
        """Indices of the examples of optimiser step ``step``, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = _order(self, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def epoch(self, step: int) -> float:
        """Epochs done after ``step``."""
        return step / self.steps_per_epoch

    def __hash__(self) -> int:
        return id(self.data)


@lru_cache(maxsize=2)
def _order(plan: Plan, epoch: int) -> np.ndarray:
    return mix.epoch_order(plan.data.source, plan.data.weights, plan.seed, epoch, plan.shuffle)


def plan(data: Encoded, batch_size: int, seed: int, shuffle: bool, epochs: float, max_steps: int | None) -> Plan:
    """Lay out a run over ``data``."""
    rows = len(mix.epoch_order(data.source, data.weights, seed, 0, shuffle))
    per_epoch = math.ceil(rows / batch_size)
    steps = max_steps or max(1, math.ceil(per_epoch * epochs - 1e-9))
    return Plan(data, batch_size, seed, shuffle, per_epoch, steps)


def micro_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Cut the rows of a step (given by their lengths) into groups of at most ``budget`` tokens, padding counted.

    A row above the budget is a group of its own. Padded rows are grouped by length; packed rows stay in order.
    """
    order = range(len(lengths)) if packed else sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    used = longest = 0
    for row in order:
        longest_now = max(longest, lengths[row])
        cost = used + lengths[row] if packed else longest_now * (len(groups[-1]) + 1 if groups else 1)
        if groups and cost <= budget:
            groups[-1].append(row)
            used, longest = used + lengths[row], longest_now
        else:
            groups.append([row])
            used = longest = lengths[row]
    return groups


def due(every: float | str | None, step: int, steps: int, steps_per_epoch: int) -> bool:
    """Whether something asked for ``every`` N steps, share of the run below 1, or ``epoch``, falls on ``step``."""
    if every is None:
        return False
    if every == "epoch":
        return step % steps_per_epoch == 0
    number = float(every)
    interval = int(number) if number >= 1 else max(1, round(number * steps))
    return step % interval == 0
