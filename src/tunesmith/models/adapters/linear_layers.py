"""Linear layers of both kinds: torch's, and gpt2's Conv1D, whose weight is (in, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tunesmith.models.network import has_attributes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear layer, also with a 4-bit weight; of an embedding (rows, out)."""
    if has_attributes(layer, "in_features"):
        linear = cast("nn.Linear", layer)
        return linear.in_features, linear.out_features
    rows, width = cast("nn.Embedding", layer).weight.shape
    return rows, width


def stores_transposed(model: PreTrainedModel) -> bool:
    """Return whether ``model`` has layers that store (in, out); peft's ``fan_in_fan_out``."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
