"""Linear layers of both kinds: torch's, and gpt2's Conv1D, which holds its weight as (in, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def widths(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, whatever the shape of its weight (4 bits have their own); of an embedding (rows, out)."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return int(layer.weight.shape[0]), int(layer.weight.shape[1])


def stores_transposed(model: PreTrainedModel) -> bool:
    """Whether ``model`` has layers that hold (in, out); peft asks for it as ``fan_in_fan_out``."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
