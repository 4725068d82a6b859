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

from tunesmith.data.store import mix
from tunesmith.data.store.encoded import Encoded
from tunesmith.errors import RecipeError

LOOKED_AT = 2000
"""Steps whose micro-batches are compared to find the heaviest: a tenth of a second."""


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

    def seen(self) -> np.ndarray:
        """Indices of the examples that any step takes, each once."""
        read = np.zeros(len(self.data), np.bool_)
        for step in range(1, self.steps + 1):
            read[self.rows(step)] = True
        return np.flatnonzero(read)

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


def micro_batches(lengths: Sequence[int], budget: int, packed: bool, several: Sequence[int] | None = None) -> list[list[int]]:
    """Cut the rows of a step (given by their lengths) into groups of at most ``budget`` tokens, padding counted.

    A row above the budget is a group of its own. Padded rows are grouped by length; packed rows stay in order. ``several``: how
    many padded rows each is (None = one).
    """
    order = range(len(lengths)) if packed else sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    used = longest = 0  # used: tokens, or padded rows
    for row in order:
        longest_now = max(longest, lengths[row])
        more = lengths[row] if packed else 1 if several is None else several[row]
        cost = used + more if packed else longest_now * (used + more)
        if groups and cost <= budget:
            groups[-1].append(row)
            used, longest = used + more, longest_now
        else:
            groups.append([row])
            used, longest = more, lengths[row]
    return groups


def cut(data: Encoded, rows: np.ndarray, budget: int, packed: bool, shared: bool) -> list[list[int]]:
    """:func:`micro_batches` of the examples ``rows``, as places in it. ``shared``: whether answers share their prompt."""
    lengths, several = data.sizes(rows, packed, shared)
    return micro_batches(lengths.tolist(), budget, packed, several.tolist())


def tokens(data: Encoded, rows: np.ndarray, packed: bool, shared: bool) -> int:
    """That go through the network when the examples ``rows`` are one micro-batch, padding counted."""
    return together(*data.sizes(rows, packed, shared), packed)


def together(lengths: np.ndarray, several: np.ndarray, packed: bool) -> int:
    """:func:`tokens` of examples of such sizes, see ``data.batch.shared_prompts.sizes``."""
    return int(lengths.sum() if packed else lengths.max() * several.sum())


def alone(data: Encoded, packed: bool, shared: bool) -> np.ndarray:
    """:func:`tokens` of each example as a micro-batch of its own, (n,)."""
    lengths, several = data.sizes(slice(None), packed, shared)
    return lengths * several


def check_processes(processes: int, rows: int, what: str) -> None:
    """The rows of a step are shared out over the processes; one that never has a row would only cost. Raises RecipeError."""
    if processes > rows:
        raise RecipeError(
            f"{processes} processes share the rows of a step, and {what} {rows}: {processes - rows} would never have one.\n"
            f"  Start at most {rows} processes, or give each step more rows."
        )


def split(
    plan: Plan, step: int, budget: int, packed: bool, process: int = 0, processes: int = 1, shared: bool = True
) -> list[list[int]]:
    """The micro-batches of optimiser step ``step`` for one of ``processes``, as places within ``plan.rows(step)``.

    All processes get the same number of them, as far as their rows go: one that needs fewer has smaller ones.
    """
    rows = plan.rows(step)
    shares = [list(range(len(rows)))[number::processes] for number in range(processes)]
    groups = [cut(plan.data, rows[share], budget, packed, shared) for share in shares]
    return [[shares[process][index] for index in group] for group in _into(groups[process], max(map(len, groups)))]


def _into(groups: list[list[int]], number: int) -> list[list[int]]:
    """``groups`` cut in halves, the one of most rows first, until there are ``number`` of them or each is a row."""
    while len(groups) < number and (most := max(groups, key=len, default=[])) and len(most) > 1:
        place, half = groups.index(most), len(most) // 2
        groups = [*groups[:place], most[:half], most[half:], *groups[place + 1 :]]
    return groups


def most_micro_batches(plan: Plan, step: int, budget: int, packed: bool, processes: int, shared: bool = True) -> int:
    """Of optimiser step ``step``, in any of ``processes``."""
    return max(len(split(plan, step, budget, packed, process, processes, shared)) for process in range(processes))


def heaviest(
    plan: Plan, budget: int, packed: bool, process: int = 0, processes: int = 1, shared: bool = True
) -> tuple[int, list[int]]:
    """(step, places) of the micro-batch with the most tokens, padding counted. A million steps are not all looked at.

    Looked at are the first LOOKED_AT steps and the step that holds the longest row.
    """
    steps = min(plan.steps, plan.steps_per_epoch)
    looked_at = list(range(1, min(steps, LOOKED_AT) + 1))
    if steps > LOOKED_AT:
        longest = int(np.argmax(alone(plan.data, packed, shared)))
        looked_at += [step for step in range(LOOKED_AT + 1, steps + 1) if longest in plan.rows(step)][:1]
    found, most = (1, [0]), 0
    for step in looked_at:
        rows = plan.rows(step)
        for places in split(plan, step, budget, packed, process, processes, shared):
            taken = tokens(plan.data, rows[places], packed, shared)
            if taken > most:
                found, most = (step, places), taken
    return found


def due(every: float | str | None, step: int, steps: int, steps_per_epoch: int) -> bool:
    """Whether something asked for ``every`` N steps, share of the run below 1, or ``epoch``, falls on ``step``."""
    if every is None:
        return False
    if every == "epoch":
        return step % steps_per_epoch == 0
    number = float(every)
    interval = int(number) if number >= 1 else max(1, round(number * steps))
    return step % interval == 0
