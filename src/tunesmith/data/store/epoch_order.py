"""The order of an epoch: which examples, how often, in which order. A pure function of seed and epoch.

No state is kept between epochs, so a resumed run reads the rows that an uninterrupted run would read.
"""

from __future__ import annotations

import numpy as np

DRAW, SHUFFLE, HOLD_OUT = 1, 2, 3  # purposes whose random streams are independent


def epoch_order(
    source: np.ndarray, weights: np.ndarray, seed: int, epoch: int, shuffle: bool = True
) -> np.ndarray:
    """Example indices of one epoch, int64.

    ``source`` int[n]: the source of each example; ``weights`` float[sources]: 2 = every example twice, 0.5 =
    a random half of them, drawn anew each epoch (at least one); 1.5 = all once and a random half again. Every
    epoch has the same number of examples. Without ``shuffle``: in the order of the files.
    """
    source, weights = np.asarray(source), np.asarray(weights, np.float64)
    if np.all(weights == 1):
        order = np.arange(len(source), dtype=np.int64)
    else:
        order = np.concatenate([*_passes(source, weights, seed, epoch), np.empty(0, np.int64)])
    return random_stream(SHUFFLE, seed, epoch).permutation(order) if shuffle else order


def _passes(source: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """Pass k holds the sources of weight above k; a source's last pass may hold a random part of it."""
    passes = []
    for number in range(int(np.ceil(weights.max(initial=0)))):
        parts = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(source == index)
            share = min(weight - number, 1.0)
            if share <= 0 or not len(members):
                continue
            if share < 1:
                size = max(round(share * len(members)), 1 if number == 0 else 0)
                draws = random_stream(DRAW, seed, epoch, index)
                members = np.sort(draws.choice(members, size, replace=False))
            parts.append(members)
        passes.append(np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64))
    return passes


def random_stream(purpose: int, seed: int, *indices: int) -> np.random.Generator:
    """Random numbers that depend on these numbers only (Philox: Salmon et al., 2011)."""
    key = np.random.SeedSequence((seed, purpose, *indices)).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
