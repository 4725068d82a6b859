"""Which number format is used where: decided once, printed, and enforced.

What is trained keeps an fp32 master copy and fp32 optimiser state: at a rate of 2e-5 an update of a bf16 weight rounds to
nothing. The network computes with weights in the compute dtype, cast once per optimiser step; frozen weights exist in it alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.load import dequantized_linear
from tunesmith.train import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWTH_STEPS = 2000
"""Good steps after which the loss scale is doubled, as in torch.amp.GradScaler."""

MOST_SKIPPED = 20
"""Steps in a row that may overflow: the scale is then 2^-20 of what it was, so that scaling is not what is wrong."""

STATE = dict.fromkeys(
    ("adamw_8bit", "paged_adamw_8bit"), "8 bits in blocks of 256 (float32 for small weights)"
)


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of the forward and backward pass; ``why`` it was chosen; ``optimiser_state``: how moments are kept."""

    compute: torch.dtype
    why: str
    optimiser_state: str = "float32"

    def as_dict(self) -> dict[str, str]:
        plain, name = asdict(self), str(self.compute).removeprefix("torch.")
        return {
            **plain,
            "compute": name,
            "trained_weights": "float32"
            if self.compute is torch.float32
            else f"float32 master, {name} working copy",
            "frozen_weights": name,
        }


def choose(wanted: str, device: torch.device, optim: str = "adamw") -> Precision:
    """``auto``: bf16 where the machine multiplies it faster than fp32 (AMX, AVX512-BF16, Ampere and later); fp16 on a CUDA device
    without bf16 (such as a T4); else fp32. A CPU gets fp16 only when asked for it: it has no fast product of two.
    """
    return replace(_compute(wanted, device), optimiser_state=STATE.get(optim, "float32"))


def _compute(wanted: str, device: torch.device) -> Precision:
    if wanted in ("fp32", "fp16"):
        return Precision(torch.float32 if wanted == "fp32" else torch.float16, "asked for")
    if device.type == "cuda":
        fast, where = (
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.cuda.get_device_name(device),
        )
    elif device.type == "cpu":
        flags = set(machine.describe()["isa"])
        fast, where = bool(flags & {"amx_bf16", "avx512_bf16"}), "this processor"
    else:
        fast, where = False, f"a {device.type} device"
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
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): the loss is multiplied by ``scale`` before backward, so that
    small gradients do not vanish in fp16, whose smallest number is 6e-8. All of it is in a checkpoint.

    A step whose gradient overflowed is left out and halves the scale; ``good`` steps in a row double it. ``skipped``: steps left
    out so far; ``in_a_row``: those since the last good one.
    """

    scale: float = 2.0**16
    good: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def after(self, finite: bool) -> None:
        """Take note of a step."""
        if finite:
            self.good, self.in_a_row = self.good + 1, 0
            if self.good == GROWTH_STEPS:
                self.scale, self.good = self.scale * 2, 0
        else:
            self.scale, self.good = self.scale / 2, 0
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring every floating-point parameter to ``dtype`` in place. Buffers (rotary frequencies, say) keep theirs; layers of 4 or 8
    bits keep their bits, and compute in ``dtype``.

    Raises ModelError for a weight that fp16 cannot hold.
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
