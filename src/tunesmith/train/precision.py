"""Number formats: chosen once, printed, and enforced.

Trained weights keep an fp32 master and fp32 optimiser state: at a rate of 2e-5 an update of a bf16 weight
rounds to zero. The network computes with weights in the compute dtype, cast once per optimiser step; frozen
weights exist in the compute dtype alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tunesmith.models.load import compute_dtype

GROWTH_STEPS = 2000
"""Finite steps after which the loss scale is doubled, as in torch.amp.GradScaler."""

MAX_OVERFLOWS = 20
"""Steps in a row that may overflow: the scale is then 2^-20 of its start, so the scale is not the cause."""

STATE = dict.fromkeys(
    ("adamw_8bit", "paged_adamw_8bit"), "8 bits in blocks of 256 (float32 for small weights)"
)


@dataclass(frozen=True)
class Precision:
    """The dtype of forward and backward, why it was chosen, and the format of the optimiser's state."""

    compute: torch.dtype
    why: str
    optimiser_state: str = "float32"

    def as_dict(self) -> dict[str, str]:
        plain, name = asdict(self), str(self.compute).removeprefix("torch.")
        full = self.compute is torch.float32
        trained = "float32" if full else f"float32 master, {name} working copy"
        return {**plain, "compute": name, "trained_weights": trained, "frozen_weights": name}


def choose(wanted: str, device: torch.device, optim: str = "adamw") -> Precision:
    """Choose the compute dtype (``compute_dtype.choose``) and the format of the optimiser's state."""
    chosen = compute_dtype.choose(wanted, device)
    return Precision(chosen.dtype, chosen.why, STATE.get(optim, "float32"))


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2); a checkpoint holds all of it.

    The loss is multiplied by ``scale`` before backward, because small gradients vanish in fp16, whose
    smallest number is 6e-8. A step whose gradient overflows is skipped and halves the scale; ``GROWTH_STEPS``
    finite ones double it.
    """

    scale: float = 2.0**16
    good: int = 0
    """Finite steps since the scale changed."""
    skipped: int = 0
    in_a_row: int = 0
    """Steps skipped since the last finite one."""

    def update(self, finite: bool) -> None:
        """Count a step and adapt the scale."""
        if finite:
            self.good, self.in_a_row = self.good + 1, 0
            if self.good == GROWTH_STEPS:
                self.scale, self.good = self.scale * 2, 0
        else:
            self.scale, self.good = self.scale / 2, 0
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
