"""Decoder layers compiled one by one (``torch.compile``): alike layers share one piece of code, whatever a batch's length.

``nn.Module.compile`` replaces how an instance is called and wraps nothing, so parameters keep their names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECOMPILE_LIMIT = 64
"""Forms of one layer that are kept. Torch's 8 would be passed by kinds of layer times training and evaluation times first layer
and the rest, and what is above the limit runs uncompiled with a line in a log that nobody reads."""


def named_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder or encoder layers by name, none inside another: what transformers marks as units of gradient checkpointing."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(
            name.startswith(f"{other}.") for other in found
        ):
            found[name] = module
    return found


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """:func:`named_layers` of the network inside ``model``."""
    return list(named_layers(base(model)).values())


def why_not(model: PreTrainedModel) -> str | None:
    """Why ``model``'s layers cannot be compiled, or None. It may be on the meta device, before ``noise.install``."""
    found = layers(model)
    if not found:
        return "transformers does not say which modules of this model are its layers"
    dropouts = [
        module
        for layer in found
        for name, module in layer.named_modules()
        if isinstance(module, nn.Dropout)
        and not name.endswith("attn_dropout")  # that one is switched off in every run
    ]
    rates = {dropout.p for dropout in dropouts if dropout.p > 0}
    if rates:
        return (
            f"its layers drop {', '.join(f'{rate:g}' for rate in sorted(rates))} of their activations, drawn on the host for "
            "each row; a compiled layer cannot ask the host. Set lora_dropout: 0 or take a model without dropout"
        )
    return None


def enable(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile every decoder layer when it is next called. Lengths are symbols: a new packing needs no new code."""
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for layer in layers(model):
        layer.compile(dynamic=True, backend=backend)


def disable(model: PreTrainedModel) -> None:
    """Give the layers their own call back."""
    for layer in layers(model):
        layer._compiled_call_impl = None


def paused() -> AbstractContextManager[Any]:
    """For as long as nothing is to be compiled: generation has other shapes with every token."""
    return torch.compiler.set_stance("force_eager")
