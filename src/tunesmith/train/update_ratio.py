"""The update ratio: the norm of an update, divided by the norm of the weights.

Healthy training moves the weights by about a thousandth per step. With a much smaller ratio the model learns
nothing (the learning rate is too low, or updates round to zero); with a much larger one the pretrained
weights are lost. The ratio is measured on a sample of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tunesmith.train import distributed

RUN, RUNS = 16, 128
"""Neighbouring elements in a run (one cache line of a CPU), and runs in the sample of a tensor."""
RECHECKED = 2**20
"""Elements checked before a tensor is reported as unmoved: few rows of a large vocabulary move."""
PATIENCE = 5
"""Updates before an unmoved tensor is checked. LoRA's B is zero, so A has no gradient in the first one."""


class UpdateRatio:
    """Measures each update of ``masters`` (fp32, by name), from ``sample_before`` to ``compare_after``.

    ``value`` is norm(update) / norm(weights before it), over all masters together: a function of the weights
    alone, so it is the same in every process and in a resumed run. Its sums stay on the device until
    ``value`` is read.

    ``sharded``: each process has another part of the masters. Then the norms are added over processes, all
    processes must read ``value`` at the same time, and ``warning`` names no tensor.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], sharded: bool = False) -> None:
        self.masters = masters
        self.sharded = sharded
        self.updates = 0
        self._watched = not sharded
        """True while the first updates record which tensors move and which have a gradient."""
        self._seen: torch.Tensor | None = None
        """bool (2, masters): an update has moved it; a gradient has reached it."""
        self._unmoved: list[str] = []
        """Tensors whose sample no update has moved so far."""
        self._unreached = list(masters)
        """Tensors that no gradient has reached so far. The test costs a pass over the whole gradient, so each
        tensor takes it only until it passes."""
        self._sample = torch.empty(0)
        self._recheck: dict[str, torch.Tensor] = {}
        self._recheck_moved: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._value = math.nan

    @property
    def value(self) -> float:
        if self._sums is not None:
            self._value, self._sums = self._quotient(self._sums.tolist()), None
        return self._value

    def record_no_update(self) -> None:
        self._value, self._sums = 0.0, None

    def moved_flags(self) -> torch.Tensor | None:
        """Return flags that ``receive_flags`` needs as numbers before the next update, or None.

        They travel with the loss, in the one message of a step to the host.
        """
        if not self._watched or self.updates > PATIENCE or self._seen is None:
            return None
        return self._seen.flatten()

    def receive_flags(self, flags: list[float]) -> None:
        count = len(self.masters)
        moved, reached = zip(self.masters, flags[:count]), zip(self.masters, flags[count:], strict=True)
        self._unmoved = [name for name, flag in moved if not flag]
        self._unreached = [name for name, flag in reached if not flag]

    @torch.no_grad()
    def sample_before(self) -> None:
        """Sample every tensor, and take a larger sample of those about to be reported as unmoved."""
        self._sample = torch.cat(self._samples())
        if self._watched and self.updates <= PATIENCE:
            names = self._unmoved if self.updates == PATIENCE else []
            self._recheck = {name: _large_sample(self.masters[name]).clone() for name in names}
            if self._seen is None:
                self._seen = torch.zeros(2, len(self.masters), dtype=torch.bool, device=self._sample.device)
            unreached = set(self._unreached)
            for number, (name, master) in enumerate(self.masters.items()):
                if name in unreached:  # without a gradient tensor there is nothing to report
                    self._seen[1, number] |= True if master.grad is None else master.grad.any()

    @torch.no_grad()
    def compare_after(self, learning_rate: float) -> None:
        """Compare with the sample. A rate of zero, as in the first step of a warm-up, moves no tensor."""
        samples = self._samples()
        lengths = [sample.numel() for sample in samples]
        moved = torch.split((torch.cat(samples) - self._sample).square_(), lengths)
        size = torch.split(self._sample.square_(), lengths)
        self._sums = torch.stack([part.sum() for part in (*moved, *size)])
        self._sample = torch.empty(0)
        if self._watched and learning_rate and self.updates <= PATIENCE and self._seen is not None:
            self._seen[0] |= self._sums[: len(lengths)] != 0
            if self.updates == PATIENCE:
                changed = [
                    (_large_sample(self.masters[name]) != old).any() for name, old in self._recheck.items()
                ]
                self._recheck_moved = torch.stack(changed) if changed else None
            self.updates += 1
        self._recheck = {}

    def _quotient(self, sums: list[float]) -> float:
        samples = self._samples()
        masters = zip(self.masters.values(), samples, strict=True)
        scales = [master.numel() / max(sample.numel(), 1) for master, sample in masters]
        moved, whole = (
            math.fsum(scale * part for scale, part in zip(scales, parts, strict=True))
            for parts in (sums[: len(samples)], sums[len(samples) :])
        )
        if self.sharded:
            whole, moved = distributed.add(whole, moved)
        return math.sqrt(moved / whole) if whole else math.nan

    def warning(self) -> str | None:
        """Return once which tensors did not move in the first updates, or moved by weight decay alone."""
        if self.updates <= PATIENCE or not self._watched or self._seen is None:
            return None
        self._watched = False
        moved, reached = (
            {name for name, flag in zip(self.masters, row, strict=True) if flag}
            for row in self._seen.tolist()
        )
        if self._recheck_moved is not None:
            rechecked = zip(self._unmoved, self._recheck_moved.tolist(), strict=True)
            moved |= {name for name, flag in rechecked if flag}
        unmoved, unreached = self.masters.keys() - moved, self.masters.keys() - reached
        names = [name for name in self.masters if name in unmoved | unreached]
        if not names:
            return None
        decayed = ", except by weight decay," if unreached - unmoved else ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{len(names)} of {len(self.masters)} trained tensors did not move{decayed} in {self.updates} updates: "
            f"{', '.join(names[:3])}{more}. No gradient reaches them, or the learning rate is too low to change them"
        )

    def _samples(self) -> list[torch.Tensor]:
        """Sample each tensor, (elements,), always at the same positions."""
        return [_sample(master) for master in self.masters.values()]


def _sample(master: torch.Tensor) -> torch.Tensor:
    flat = master.detach().flatten()
    if flat.numel() <= RUN * RUNS:
        return flat
    step, width = math.ceil(flat.numel() / RUNS), master.shape[-1]
    if width < flat.numel():  # shift by a golden part of a row, so that runs fall on different columns
        step = max(RUN, step // width * width + round(0.618 * width))
    return flat.unfold(0, RUN, step).flatten()


def _large_sample(master: torch.Tensor) -> torch.Tensor:
    return master.detach().flatten()[:: math.ceil(master.numel() / RECHECKED) or 1]
