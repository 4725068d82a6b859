"""Which number format is used where: decided once, printed, and enforced.

What is trained keeps an fp32 master copy and fp32 optimiser state: at a rate of 2e-5 an update of a bf16 weight rounds to
nothing. The network computes with weights in the compute dtype, cast once per optimiser step; frozen weights exist in it alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from tunesmith.engine import machine
from tunesmith.errors import RecipeError


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of the forward and backward pass; ``why`` it was chosen."""

    compute: torch.dtype
    why: str

    def as_dict(self) -> dict[str, str]:
        plain = asdict(self)
        return {
            **plain,
            "compute": str(self.compute).removeprefix("torch."),
            "trained_weights": "float32" if self.compute is torch.float32 else "float32 master, bfloat16 working copy",
            "frozen_weights": str(self.compute).removeprefix("torch."),
            "optimiser_state": "float32",
        }


def choose(wanted: str, device: torch.device) -> Precision:
    """``auto``: bf16 where the machine multiplies it faster than fp32 (AMX, AVX512-BF16, Ampere and later), else fp32."""
    if wanted == "fp32":
        return Precision(torch.float32, "asked for")
    if device.type == "cuda":
        fast, where = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        flags = set(machine.describe()["isa"])
        fast, where = bool(flags & {"amx_bf16", "avx512_bf16"}), "this processor"
    else:
        fast, where = False, f"a {device.type} device"
    if wanted == "bf16":
        if device.type == "cuda" and not fast:
            raise RecipeError(f"train.precision=bf16: {where} has no bf16 arithmetic. Use precision=fp32 or auto.")
        return Precision(torch.bfloat16, "asked for")
    if fast:
        return Precision(torch.bfloat16, f"{where} multiplies bf16 faster than fp32")
    return Precision(torch.float32, f"{where} has no fast bf16")


def cast(model: Any, dtype: torch.dtype) -> None:
    """Bring every floating-point parameter to ``dtype`` in place. Buffers (rotary frequencies, say) keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
