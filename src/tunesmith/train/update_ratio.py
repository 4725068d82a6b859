"""How far an update moves the weights, measured in their own size.

Healthy training moves them by about a thousandth a step. Far less, and nothing is learnt (a rate that is too low, updates that
round to nothing); far more, and what was learnt before is lost. It is measured on a sample of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tunesmith.train import distributed

RUN, RUNS = 16, 128
"""Neighbours looked at together (what one line of a CPU's cache holds), and how many such runs in each tensor."""
CLOSER = 2**20
"""Elements looked at before a tensor is said not to move: of a large vocabulary only the rows that were seen do."""
PATIENCE = 5
"""Updates that a tensor may stand still. The first one may: LoRA's B is zero, so no gradient reaches A."""


class Ratio:
    """``before`` and ``after`` enclose an update of ``masters`` (by name, fp32) by their ``grad``; ``value`` is what it came to.

    ``value`` is norm(update) / norm(weights before it), over all masters together: a function of the weights alone, so it is the
    same in every process and in a resumed run. Sums stay on the device until somebody reads ``value``. ``shared``: each process
    has other masters, parts of the tensors; then their norms are added up, so all processes read ``value`` at the same time,
    and no tensor is named.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], shared: bool = False) -> None:
        self.masters = masters
        self.shared = shared
        self.updates = 0
        self._watched = not shared
        """Whether tensors are watched for being moved, and reached by a gradient, in the first updates."""
        self._seen: torch.Tensor | None = None
        """bool (2, masters): moved by an update so far; reached by a gradient so far."""
        self._still: list[str] = []
        """Tensors whose sample no update has moved; known after ``PATIENCE`` updates."""
        self._kept = torch.empty(0)
        self._closer: dict[str, torch.Tensor] = {}
        self._closer_moved: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._value = math.nan

    @property
    def value(self) -> float:
        if self._sums is not None:
            self._value, self._sums = self._quotient(self._sums.tolist()), None
        return self._value

    def stood_still(self) -> None:
        """The last update changed nothing."""
        self._value, self._sums = 0.0, None

    def pending(self) -> torch.Tensor | None:
        """Flags that ``settle`` wants as numbers before the next update; None when it wants none. They travel with the loss
        in the one message of a step."""
        due = self._watched and self.updates == PATIENCE and self._seen is not None
        return self._seen.flatten() if due and self._seen is not None else None

    def settle(self, flags: list[float]) -> None:
        """Learn which tensors no update has moved, from ``pending``."""
        self._still = [
            name for name, moved in zip(self.masters, flags[: len(self.masters)], strict=True) if not moved
        ]

    @torch.no_grad()
    def before(self) -> None:
        """Keep a sample of every tensor, and more of those that are about to be said not to move."""
        self._kept = torch.cat(self._samples())
        if self._watched and self.updates <= PATIENCE:
            self._closer = {
                name: _closer(self.masters[name]).clone() for name in self._still if self.updates == PATIENCE
            }
            gradients = [master.grad for master in self.masters.values()]
            none = self._kept.new_ones((), dtype=torch.bool)  # without a gradient there is nothing to tell
            reached = torch.stack([none if gradient is None else gradient.any() for gradient in gradients])
            if self._seen is None:
                self._seen = torch.zeros(2, len(self.masters), dtype=torch.bool, device=reached.device)
            self._seen[1] |= reached

    @torch.no_grad()
    def after(self, learning_rate: float) -> None:
        """Compare with the sample. At a rate of zero, as in the first step of a warm-up, a tensor may stand still."""
        samples = self._samples()
        lengths = [sample.numel() for sample in samples]
        moved = (torch.cat(samples) - self._kept).square_().split(lengths)
        size = self._kept.square_().split(lengths)
        self._sums = torch.stack([part.sum() for part in (*moved, *size)])
        self._kept = torch.empty(0)
        if self._watched and learning_rate and self.updates <= PATIENCE and self._seen is not None:
            self._seen[0] |= self._sums[: len(lengths)] != 0
            if self.updates == PATIENCE:
                looks = [(_closer(self.masters[name]) != kept).any() for name, kept in self._closer.items()]
                self._closer_moved = torch.stack(looks) if looks else None
            self.updates += 1
        self._closer = {}

    def _quotient(self, sums: list[float]) -> float:
        samples = self._samples()
        moved_by, sized = sums[: len(samples)], sums[len(samples) :]
        shares = [
            master.numel() / max(one.numel(), 1)
            for master, one in zip(self.masters.values(), samples, strict=True)
        ]
        whole = math.fsum(share * one for share, one in zip(shares, sized, strict=True))
        moved_whole = math.fsum(share * one for share, one in zip(shares, moved_by, strict=True))
        if self.shared:
            whole, moved_whole = distributed.add(whole, moved_whole)
        return math.sqrt(moved_whole / whole) if whole else math.nan

    def warning(self) -> str | None:
        """Once, after the first updates: which tensors none of them has moved, or nothing but weight decay has."""
        if self.updates <= PATIENCE or not self._watched or self._seen is None:
            return None
        self._watched = False
        moved, reached = (
            {name for name, flag in zip(self.masters, row, strict=True) if flag}
            for row in self._seen.tolist()
        )
        if self._closer_moved is not None:
            moved |= {
                name for name, flag in zip(self._still, self._closer_moved.tolist(), strict=True) if flag
            }
        still, unreached = self.masters.keys() - moved, self.masters.keys() - reached
        names = [name for name in self.masters if name in still | unreached]
        if not names:
            return None
        decayed = ", but for weight decay," if unreached - still else ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{len(names)} of {len(self.masters)} trained tensors did not move{decayed} in {self.updates} updates: "
            f"{', '.join(names[:3])}{more}. No gradient reaches them, or the learning rate is too low to change them"
        )

    def _samples(self) -> list[torch.Tensor]:
        """Of each tensor (elements,), always at the same places."""
        return [_sample(master) for master in self.masters.values()]


def _sample(master: torch.Tensor) -> torch.Tensor:
    flat = master.detach().flatten()
    if flat.numel() <= RUN * RUNS:
        return flat
    step, width = math.ceil(flat.numel() / RUNS), master.shape[-1]
    if (
        width < flat.numel()
    ):  # whole rows and a golden part of one, so that runs do not meet the same columns in every row
        step = max(RUN, step // width * width + round(0.618 * width))
    return flat.unfold(0, RUN, step).flatten()


def _closer(master: torch.Tensor) -> torch.Tensor:
    return master.detach().flatten()[:: math.ceil(master.numel() / CLOSER) or 1]
