"""The dtype in which a model computes: chosen by the machine, printed, and enforced.

Training and every command that opens a model choose it here, whatever dtype the weights are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from tunesmith import machine
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.fast import kernels
from tunesmith.models.load import dequantized_linear, huge_pages
from tunesmith.models.load.mapped_files import MappedFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Wanted: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
"""``train.precision`` of a recipe, and ``--precision`` of a command."""


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype of forward and backward passes, and why it was chosen."""

    dtype: torch.dtype
    why: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"computing in {self.name}: {self.why}"

    def as_dict(self) -> dict[str, str]:
        return {"compute": self.name, "why": self.why}


def choose(wanted: str, device: torch.device) -> ComputeDtype:
    """Choose the compute dtype for ``wanted`` (one of ``Wanted``).

    ``auto``: bf16 where the machine multiplies it faster than fp32 (AMX, AVX512-BF16, Ampere and later), fp16
    on a CUDA device without bf16 (such as a T4), else fp32.
    """
    if wanted in ("fp32", "fp16"):
        return ComputeDtype(torch.float32 if wanted == "fp32" else torch.float16, "asked for")
    fast, where = False, f"a {device.type} device"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        where = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        fast = bool({"amx_bf16", "avx512_bf16"} & set(machine.describe()["isa"]))
        where = "this processor"
    if wanted == "bf16":
        if device.type == "cuda" and not fast:
            raise RecipeError(f"precision bf16: {where} has no bf16 arithmetic. Use precision fp32 or auto.")
        return ComputeDtype(torch.bfloat16, "asked for")
    if fast:
        return ComputeDtype(torch.bfloat16, f"{where} multiplies bf16 faster than fp32")
    if device.type == "cuda":
        return ComputeDtype(torch.float16, f"{where} has no bf16 arithmetic")
    return ComputeDtype(torch.float32, f"{where} has no fast bf16")


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every floating-point parameter to ``dtype`` in place.

    Buffers (such as rotary frequencies) keep their dtype; layers of 4 or 8 bits keep their bits and compute
    in ``dtype``. Raises ModelError for a weight that fp16 cannot hold.
    """
    dequantized_linear.compute_in(model, dtype)
    files = MappedFiles()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            stored = parameter.data
            parameter.data = stored.to(dtype)
            files.drop(stored)
            if dtype is torch.float16 and not parameter.data.isfinite().all():
                raise ModelError(
                    f"precision fp16: the weight {name} holds numbers above 65504, the largest of fp16 (or not finite).\n"
                    "  Use precision bf16 or fp32."
                )


def cast_and_move(model: PreTrainedModel, wanted: str, device: torch.device | None = None) -> ComputeDtype:
    """Make a loaded model ready to compute without gradients: choose its dtype, cast it, move it to ``device``.

    ``device``: None = the CUDA device if there is one, else the CPU, where the weights move to huge pages.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose(wanted, device)
    cast(model, chosen.dtype)
    model.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        kernels.return_freed_memory()  # 38 MB of SmolLM2-135M: reading a tokenizer takes twice what it keeps
        huge_pages.move_weights(model)
    return chosen
