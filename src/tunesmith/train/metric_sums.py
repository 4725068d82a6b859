"""Sums of the objective's metrics between two logs, on the device and equal in every process."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tunesmith.train import distributed

Sums = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Sum of the loss, and metric -> float64 (2,): [sum, count]; on the device."""


class MetricSums:
    """One message per step adds the sums of all processes; the host reads them to log or save.

    An objective returns the same metrics for every batch, so the names are exchanged in the first step only.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._names: list[str] | None = None

    def add(self, loss: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Add this process's sums of a step (metric -> (2,)).

        Returns the loss summed over all processes, in float64 where the device has it.
        """
        loss = loss.to(exact_dtype(loss.device))
        if distributed.state().num_processes > 1:
            if self._names is None:
                self._names = sorted({name for part in distributed.gather([sorted(sums)]) for name in part})
            zeros = loss.new_zeros(2)
            message = torch.cat([loss.reshape(1), *(sums.get(name, zeros) for name in self._names)])
            total = distributed.add_tensor(message)
            loss, sums = total[0], dict(zip(self._names, total[1:].view(-1, 2), strict=True))
        for name, pair in sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        return loss

    def read(self) -> dict[str, list[float]]:
        """Return {metric: [sum, count]}, in one transfer from the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        return dict(zip(names, torch.stack([self._sums[name] for name in names]).tolist(), strict=True))

    def clear(self) -> None:
        self._sums = {}

    def load(self, sums: Mapping[str, list[float]], device: torch.device) -> None:
        """Restore what ``read`` returned."""
        dtype = exact_dtype(device)
        self._sums = {name: torch.tensor(pair, dtype=dtype).to(device) for name, pair in sums.items()}


def as_pair(value: torch.Tensor | float, count: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Return a sum and a count as one tensor (2,), without waiting for the device."""
    dtype = exact_dtype(device)
    parts = [
        part.detach().to(dtype)
        if isinstance(part, torch.Tensor)
        else torch.full((), part, dtype=dtype, device=device)
        for part in (value, count)
    ]
    return torch.stack(parts)


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def speed(window: Mapping[str, float]) -> dict[str, float]:
    """Return time and speed of the steps of a logging window, and those without their source where it samples."""
    figures = {"seconds": window["seconds"], "tokens_per_second": window["tokens"] / window["seconds"]}
    if seconds := window.get("update_seconds"):
        figures |= {"update_seconds": seconds, "update_tokens_per_second": window["tokens"] / seconds}
    return figures
