"""Number formats: chosen once, printed, and enforced.

Trained weights keep an fp32 master and fp32 optimiser state: at a rate of 2e-5 an update of a bf16 weight
rounds to zero. The network computes with weights in the compute dtype, cast once per optimiser step; frozen
weights exist in the compute dtype alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from tunesmith import machine
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.load import dequantized_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """Choose the compute dtype.

    ``auto``: bf16 where the machine multiplies it faster than fp32 (AMX, AVX512-BF16, Ampere
    and later), fp16 on a CUDA device without bf16 (such as a T4), else fp32.
    """
    return replace(_compute(wanted, device), optimiser_state=STATE.get(optim, "float32"))


def _compute(wanted: str, device: torch.device) -> Precision:
    if wanted in ("fp32", "fp16"):
        return Precision(torch.float32 if wanted == "fp32" else torch.float16, "asked for")
    fast, where = False, f"a {device.type} device"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        where = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        fast = bool({"amx_bf16", "avx512_bf16"} & set(machine.describe()["isa"]))
        where = "this processor"
    if wanted == "bf16":
        if device.type == "cuda" and not fast:
            raise RecipeError(
                f"train.precision=bf16: {where} has no bf16 arithmetic. Use precision=fp32 or auto."
            )
        return Precision(torch.bfloat16, "asked for")
    if fast:
        return Precision(torch.bfloat16, f"{where} multiplies bf16 faster than fp32")
    if device.type == "cuda":
        return Precision(torch.float16, f"{where} has no bf16 arithmetic")
    return Precision(torch.float32, f"{where} has no fast bf16")


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


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every floating-point parameter to ``dtype`` in place.

    Buffers (such as rotary frequencies) keep their dtype; layers of 4 or 8 bits keep their bits and compute
    in ``dtype``. Raises ModelError for a weight that fp16 cannot hold.
    """
    dequantized_linear.compute_in(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            if dtype is torch.float16 and not parameter.data.isfinite().all():
                raise ModelError(
                    f"train.precision=fp16: the weight {name} holds numbers above 65504, the largest of fp16 (or not finite).\n"
                    "  Use train.precision=bf16 or fp32."
                )
