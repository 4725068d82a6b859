"""Metrics of the objective between two logs: sums and counts that stay on the device, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tunesmith.train import distributed


class MetricSums:
    """Sums since the last log. One message a step adds those of all processes; the host reads them at a log or a save.

    An objective gives the same metrics for every batch, so processes agree on the names in the first step and never again.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._names: list[str] | None = None

    def add(self, loss: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Add a step's sums of this process (metric -> (2,)); returns the loss summed over all processes, float64 where the
        device has it."""
        loss = loss.to(exact(loss.device))
        if distributed.state().num_processes > 1:
            if self._names is None:
                self._names = sorted({name for part in distributed.gather([sorted(sums)]) for name in part})
            nothing = loss.new_zeros(2)
            message = torch.cat([loss.reshape(1), *(sums.get(name, nothing) for name in self._names)])
            loss, *values = distributed.add_tensor(message).split([1] + [2] * len(self._names))
            loss, sums = loss[0], dict(zip(self._names, values, strict=True))
        for name, pair in sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        return loss

    def plain(self) -> dict[str, list[float]]:
        """{metric: [sum, count]}, read from the device at once."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        return dict(zip(names, torch.stack([self._sums[name] for name in names]).tolist(), strict=True))

    def clear(self) -> None:
        self._sums = {}

    def load(self, plain: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from ``plain``."""
        self._sums = {
            name: torch.tensor(pair, dtype=exact(device)).to(device) for name, pair in plain.items()
        }


def as_pair(value: Any, count: Any, device: torch.device) -> torch.Tensor:
    """(2,) of a sum and a count, numbers or tensors, without waiting for the device."""
    dtype = exact(device)
    return torch.stack(
        [part.detach().to(dtype) if isinstance(part, torch.Tensor) else torch.full((), part, dtype=dtype, device=device)
         for part in (value, count)]
    )  # fmt: skip


def exact(device: torch.device) -> torch.dtype:
    """float64, but on Apple GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64
