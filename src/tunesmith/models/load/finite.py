"""Find weights that are not finite, in memory and in the files that were just written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.models.find import headers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MOST_NAMES = 3
"""Tensors that a message names."""


def count_non_finite(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of NaN and infinite values by name, for the tensors that hold any.

    Reads every tensor once, without a copy, and waits for the device once.
    """
    import torch

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fp8 and integers hold no infinity
    floats = {name: one.detach() for name, one in tensors.items() if one.dtype in kinds and one.numel()}
    if not floats:
        return {}
    # both are NaN if a value is NaN; 20 times as fast as the largest magnitude
    extremes = [torch.stack([*torch.aminmax(one)]) for one in floats.values()]
    are_finite = [one.isfinite().all() for one in extremes]
    flags = torch.stack([one.to(are_finite[0].device) for one in are_finite]).tolist()
    bad = [name for name, is_finite in zip(floats, flags, strict=True) if not is_finite]
    return {name: int((~floats[name].isfinite()).sum()) for name in bad}


def describe(counts: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> str:
    """``2 of 30 tensors hold values that are not finite (NAME: 12 of 64 values, ...)``."""
    named = [f"{name}: {count:,} of {tensors[name].numel():,} values" for name, count in counts.items()]
    listed = ", ".join([*named[:_MOST_NAMES], *(["..."] if len(named) > _MOST_NAMES else [])])
    return f"{len(counts)} of {len(tensors)} tensors hold values that are not finite ({listed})"


def check_loaded(model: PreTrainedModel, folder: Path) -> None:
    """Raise ModelError when a weight of the network loaded from ``folder`` is not finite."""
    weights = dict(model.named_parameters())
    if counts := count_non_finite(weights):
        raise ModelError(
            f"{folder} cannot be used: {describe(counts, weights)}.\n"
            "  Copy or download the model again, or take an earlier checkpoint of the run that made it."
        )


def check_saved(folder: Path) -> None:
    """Raise ModelError when a weight file in ``folder`` holds a value that is not finite.

    The files are read, not the network: a cast to the saved dtype may overflow.
    """
    from safetensors.torch import load_file

    paths = headers.weight_files(folder, "model") + headers.weight_files(folder, "adapter_model")
    for path in paths:
        tensors = load_file(path)
        if counts := count_non_finite(tensors):
            raise ModelError(
                f"{path.name} would be written with numbers that no model can use: {describe(counts, tensors)}.\n"
                "  Nothing is kept. Look for the step that made them, or save in another dtype (--dtype float32)."
            )
