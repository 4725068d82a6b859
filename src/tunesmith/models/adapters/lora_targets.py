"""Linear layers that get no LoRA by default: routers, gates narrower than the rank, weights that a kernel reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tunesmith.models.adapters.linear_layers import widths
from tunesmith.models.network import attribute, has_attributes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config keys of the number of experts that a router chooses from."""
NARROW_SHARE = 0.05
"""Layers narrower than r get no LoRA if they hold at most this share of the weights."""


def left_out(model: PreTrainedModel, names: Sequence[str], rank: int) -> dict[str, str]:
    """Return those of the linear layers ``names`` that get no LoRA of this ``rank``, with the reason.

    A narrow layer is usually a gate, with one or two outputs. If layers narrower than r hold a large share of
    the weights, r is the mistake: such layers are not left out, and the caller reports the error.
    """
    found: dict[str, str] = {}
    narrow: dict[str, str] = {}
    sizes = {name: widths(model.get_submodule(name)) for name in names}
    for name, size in sizes.items():
        if _is_router(model, name, size[1]):
            found[name] = "it chooses the experts"
        elif _is_read_by_kernel(model, name):
            found[name] = "a kernel reads its weight alone"
        elif min(size) < rank:
            narrow[name] = f"{size[0]} x {size[1]} is narrower than r = {rank}"
    weights = {name: math.prod(size) for name, size in sizes.items()}
    if sum(weights[name] for name in narrow) <= NARROW_SHARE * sum(weights.values()):
        found |= narrow
    return found


def note(left_out: Mapping[str, str]) -> str:
    """Name the layers without a LoRA; a layer that every block has is named once."""
    ends = {name_in_block(name): why for name, why in left_out.items()}
    listed = "; ".join(f"{end} ({why})" for end, why in ends.items())
    return f"no LoRA on {len(left_out)} linear layers: {listed}. Name them in adaptation.target_modules to train them"


def name_in_block(name: str) -> str:
    """Return the part of a layer's name that is the same in every block."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _is_router(model: PreTrainedModel, name: str, outputs: int) -> bool:
    """Return whether a linear layer chooses the experts of a token: it has one output for each."""
    config = model.config.get_text_config()
    named = any(part.endswith("router") or part in ("gate", "wg") for part in name.split("."))
    return named and outputs in {attribute(config, key) for key in EXPERTS}


def _is_read_by_kernel(model: PreTrainedModel, name: str) -> bool:
    """Return whether a state-space layer passes the weight of a linear layer to a kernel on a GPU.

    The kernel would not see an adapter (``mamba_split_conv1d_scan_combined``); peft refuses some of them.
    """
    parent, _, end = name.rpartition(".")
    return end == "out_proj" and has_attributes(model.get_submodule(parent), "A_log", "D")
