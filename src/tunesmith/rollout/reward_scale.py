"""Running normalisation and clipping of rewards, so that their scale does not set the size of the updates.

Mean and variance cover all rewards of the run so far (Welford 1962, in the parallel form of Chan, Golub and
LeVeque 1979). They are part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

Normalization = Literal["none", "std", "mean_std"]


class RewardScale:
    """``normalization``: std = divide by the running standard deviation, mean_std = subtract the running mean
    first. ``clip``: limit of the absolute value after that; None = no limit."""

    def __init__(self, normalization: Normalization = "none", clip: float | None = None) -> None:
        self.normalization, self.clip = normalization, clip
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        """Rewards so far, their mean, and the sum of their squared differences from it."""

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Add ``rewards`` (n,) to the statistics, and return them normalised and clipped, float64 (n,)."""
        scaled = np.asarray(rewards, np.float64)
        self._add(scaled)
        if self.normalization == "mean_std":
            scaled = scaled - self.mean
        if self.normalization != "none" and (std := self.std) > 0:
            scaled = scaled / std
        return scaled if self.clip is None else np.clip(scaled, -self.clip, self.clip)

    @property
    def std(self) -> float:
        """Standard deviation of the rewards so far; 0 with fewer than two."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def _add(self, rewards: np.ndarray) -> None:
        count = len(rewards)
        if not count:
            return
        mean = math.fsum(rewards) / count
        squares = math.fsum((rewards - mean) ** 2)
        total, delta = self.count + count, mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def state(self) -> dict[str, float]:
        """The statistics, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a :meth:`state`."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
