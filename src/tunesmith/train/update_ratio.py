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
    same in every process and in a resumed run. ``shared``: each process has other masters, parts of the tensors; then their norms
    are added up and no tensor is named.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], shared: bool = False) -> None:
        self.masters = masters
        self.shared = shared
        self.value = math.nan
        self.still = set() if shared else set(masters)
        """The tensors that no update has moved yet."""
        self.unreached = set(self.still)
        """Those whose gradient was zero in every update so far: weight decay moves them all the same."""
        self.updates = 0
        self.kept = torch.empty(0)
        self.closer: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Keep a sample of every tensor, and more of those that are about to be said not to move."""
        self.kept = torch.cat(self._samples())
        self.closer = {name: _closer(self.masters[name]).clone() for name in self.still if self.updates == PATIENCE}
        if self.updates <= PATIENCE:
            gradients = {name: self.masters[name].grad for name in self.unreached}
            self.unreached -= {name for name, gradient in gradients.items() if gradient is None or gradient.any()}

    @torch.no_grad()
    def after(self, learning_rate: float) -> None:
        """Compare with the sample. At a rate of zero, as in the first step of a warm-up, a tensor may stand still."""
        samples = self._samples()
        lengths = [sample.numel() for sample in samples]
        moved = (torch.cat(samples) - self.kept).square_().split(lengths)
        size = self.kept.square_().split(lengths)
        sums = torch.stack([part.sum() for part in (*moved, *size)]).tolist()  # one message from the device
        moved_by, sized = sums[: len(lengths)], sums[len(lengths) :]
        shares = [master.numel() / max(length, 1) for master, length in zip(self.masters.values(), lengths, strict=True)]
        whole = math.fsum(share * one for share, one in zip(shares, sized, strict=True))
        moved_whole = math.fsum(share * one for share, one in zip(shares, moved_by, strict=True))
        if self.shared:
            whole, moved_whole = distributed.add(whole, moved_whole)
        self.value = math.sqrt(moved_whole / whole) if whole else math.nan
        self.kept = torch.empty(0)
        if (self.still or self.unreached) and learning_rate and self.updates <= PATIENCE:
            self.updates += 1
            self.still -= {name for name, distance in zip(self.masters, moved_by, strict=True) if distance}
            self.still -= {name for name, kept in self.closer.items() if not _closer(self.masters[name]).equal(kept)}
        self.closer = {}

    def warning(self) -> str | None:
        """Once, after the first updates: which tensors none of them has moved, or nothing but weight decay has."""
        if self.updates <= PATIENCE or not self.still | self.unreached:
            return None
        names = [name for name in self.masters if name in self.still | self.unreached]
        decayed = ", but for weight decay," if self.unreached - self.still else ""
        self.still, self.unreached = set(), set()
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
    if width < flat.numel():  # whole rows and a golden part of one, so that runs do not meet the same columns in every row
        step = max(RUN, step // width * width + round(0.618 * width))
    return flat.unfold(0, RUN, step).flatten()


def _closer(master: torch.Tensor) -> torch.Tensor:
    return master.detach().flatten()[:: math.ceil(master.numel() / CLOSER) or 1]
