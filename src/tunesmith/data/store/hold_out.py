"""The choice of held-out rows: exactly a share of all rows, and never one whose prompt is also trained on.

Rows with the same ``rows.group_key`` (the same prompt) form one group, across all sources. The groups are
sorted by a hash of key and seed. They are taken in this order if they fit, until the wanted number of rows is
reached. So the choice depends neither on the order of the rows nor on their files. When rows are added, a
group changes sides only to make room: of n rows added, about ``fraction * n`` are held out, and at most as
many others move.
"""

from __future__ import annotations

import hashlib

import numpy as np

from tunesmith.data.data_config import EvalConfig
from tunesmith.data.store.data_report import HeldOut
from tunesmith.data.store.epoch_order import HOLD_OUT, random_stream
from tunesmith.errors import DataError

EXACT = 4096
"""If taking what fits misses the wanted number, the groups of its last EXACT rows may be exchanged for
others. So a wanted number up to EXACT is met exactly wherever the sizes of the groups allow it."""


def split(groups: np.ndarray, config: EvalConfig, seed: int) -> tuple[np.ndarray, HeldOut | None]:
    """Return the sorted keys of the groups to hold out, and their report. Without a share: no keys, and None.

    ``groups``: the key (uint64) of every row. With two rows or more, each side gets at least one. Raises
    DataError when all rows are one group.
    """
    rows, fraction = len(groups), config.fraction
    if fraction == 0 or rows < 2:
        return groups[:0], None
    if (groups == groups[0]).all():
        raise DataError(
            f"all {rows} rows have the same prompt, so no rows of another prompt can be held out.\n"
            "  Set data.eval.fraction=0, or name a file to evaluate on: data.eval.path."
        )
    most = config.limit or rows
    asked = min(most, max(1, min(rows - 1, round(fraction * rows))))
    keys = choose(groups, asked, most, seed)
    return keys, HeldOut(int(among(groups, keys).sum()), asked, rows, len(keys), digest(keys))


def hashes(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a hash (uint64) of each key (uint64) and the seed.

    SplitMix64 (Steele, Lea and Flood 2014) of the key, started at a number drawn from the seed.
    """
    start = random_stream(HOLD_OUT, seed).integers(0, 1 << 63, dtype=np.uint64)
    bits = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits += start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    return bits


def choose(keys: np.ndarray, wanted: int, most: int, seed: int) -> np.ndarray:
    """Return the keys (uint64, sorted) of the groups to hold out. ``keys``: the key of every row.

    The groups have ``wanted`` rows, or the nearest number that their sizes allow, at most ``most``. At least
    one group is held out, even if it has more rows, and at least one is left. Expects two groups or more.
    """
    groups, counts = np.unique(keys, return_counts=True)
    order = np.argsort(hashes(groups, seed), kind="stable").astype(np.int32)
    sizes = counts.astype(np.int32)[order]
    taken = _take_fitting(sizes, wanted)
    if sizes[taken].sum() != wanted:
        taken = _take_nearest(sizes, wanted, min(most, len(keys) - 1))
    return np.sort(groups[order[taken]])


def among(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return bool[groups], true for groups that are among the sorted ``keys``."""
    return keys[np.minimum(np.searchsorted(keys, groups), len(keys) - 1)] == groups


def digest(keys: np.ndarray) -> str:
    """Return a hash of the held-out groups, by which a resumed run knows that it has the same ones."""
    return hashlib.sha256(np.sort(keys).astype("<u8").tobytes()).hexdigest()[:16]


def _take_fitting(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Return the indices of the groups, in order. Each group is taken if ``wanted`` still has room for it."""
    ends = np.cumsum(sizes)
    at = int(np.searchsorted(ends, wanted, side="right"))
    taken, room = [*range(at)], wanted - int(ends[at - 1] if at else 0)
    while room and (fits := sizes[at:] <= room).any():
        at += int(np.argmax(fits)) + 1
        taken.append(at - 1)
        room -= int(sizes[at - 1])
    return np.array(taken, np.int64)


def _take_nearest(sizes: np.ndarray, wanted: int, most: int) -> np.ndarray:
    """Return the indices of groups whose number of rows is nearest to ``wanted``, the lower of two as near.

    This is subset sum by dynamic programming. Bit n of ``sums`` is set if some of the groups seen so far have
    n rows together. ``first`` has for each sum the group that reached it first; following it back finds the
    other groups.
    """
    ends = np.cumsum(sizes)
    fixed = int(np.searchsorted(ends, wanted - EXACT, side="right"))
    before = int(ends[fixed - 1]) if fixed else 0
    target, top = wanted - before, min(most - before, 2 * (wanted - before))
    sums, mask = 1, (1 << max(0, top) + 1) - 1
    first: dict[int, int] = {}
    for index, size in enumerate(sizes[fixed:].tolist(), fixed):
        new = sums << size & mask & ~sums
        sums |= new
        while new:
            reached = new.bit_length() - 1
            first[reached] = index
            new ^= 1 << reached
        if target in first:
            break
    choices = [*first, *([0] if fixed else [])]
    if not choices:  # every group is too large
        return np.array([np.argmin(sizes)], np.int64)
    left, taken = min(choices, key=lambda rows: (abs(rows - target), rows)), [*range(fixed)]
    while left:
        taken.append(first[left])
        left -= int(sizes[first[left]])
    return np.array(taken, np.int64)
