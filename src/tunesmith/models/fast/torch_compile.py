"""Layers compiled one by one (``torch.compile``): equal layers share one form for batches of any length.

``nn.Module.compile`` replaces how an instance is called and wraps nothing, so parameters keep their names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECOMPILE_LIMIT = 64
"""Compiled forms of one layer. torch's limit of 8 is less than the kinds of layers, times training and
evaluation, times first layer and the rest; above the limit torch silently runs uncompiled."""


def named_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers by name, none inside another: transformers' units of gradient checkpointing."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return found


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the :func:`named_layers` of the network inside ``model``."""
    return list(named_layers(base(model)).values())


def why_not(model: PreTrainedModel) -> str | None:
    """Return why ``model``'s layers cannot be compiled, or None. Works on the meta device."""
    found = layers(model)
    if not found:
        return "transformers does not mark which modules of this model are its layers"
    # attn_dropout is switched off in every run
    named = [(name, module) for layer in found for name, module in layer.named_modules()]
    dropouts = [
        module
        for name, module in named
        if isinstance(module, nn.Dropout) and not name.endswith("attn_dropout")
    ]
    rates = sorted({dropout.p for dropout in dropouts if dropout.p > 0})
    if rates:
        return (
            f"its layers drop {', '.join(f'{rate:g}' for rate in rates)} of their activations, drawn on the host for "
            "each row, which a compiled layer cannot do. Set lora_dropout: 0 or take a model without dropout"
        )
    return None


def enable(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile every layer at its next call. Lengths are symbolic: a new packing is not compiled again."""
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for layer in layers(model):
        layer.compile(dynamic=True, backend=backend)


def disable(model: PreTrainedModel) -> None:
    """Restore the layers' own call."""
    for layer in layers(model):
        layer._compiled_call_impl = None


def paused() -> AbstractContextManager[object]:
    """Compile nothing inside the ``with`` block: generation has other shapes with every token."""
    return torch.compiler.set_stance("force_eager")
