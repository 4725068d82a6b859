"""Linear layers of both kinds: torch's, and gpt2's Conv1D, whose weight is (in, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tunesmith.models.network import attribute, has_attributes

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


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configs for the number of experts that a router chooses from."""


def is_router(model: PreTrainedModel, name: str) -> bool:
    """Return whether the linear layer ``name`` chooses the experts of a token: it has one output for each."""
    config = model.config.get_text_config()
    counts = {attribute(config, key) for key in EXPERTS}
    named = any(part.endswith("router") or part in ("gate", "wg") for part in name.split("."))
    return named and widths(model.get_submodule(name))[1] in counts


def is_read_by_kernel(model: PreTrainedModel, name: str) -> bool:
    """Return whether a state-space layer hands the weight of the linear layer ``name`` to a kernel on a GPU.

    The kernel would not see an adapter (``mamba_split_conv1d_scan_combined``); peft refuses some of them.
    """
    parent, _, end = name.rpartition(".")
    return end == "out_proj" and has_attributes(model.get_submodule(parent), "A_log", "D")


def stores_transposed(model: PreTrainedModel) -> bool:
    """Return whether ``model`` has layers that store (in, out); peft's ``fan_in_fan_out``."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
