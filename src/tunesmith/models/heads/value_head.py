"""The value head: one number for each position, from the last hidden states of the policy itself.

Policy and value model share the body. The head is a module of the network, so it is trained, kept in fp32
masters and saved in checkpoints like every other weight, under every adaptation. It is saved next to the
model in a file of its own: the model stays one that transformers and peft open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.models.heads import lm_head
from tunesmith.models.heads.head_types import VALUE_HEAD as NAME
from tunesmith.models.network import base, submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = f"{NAME}.safetensors"


def attach(model: PreTrainedModel, saved: Path | None = None) -> None:
    """Add a trainable value head to ``model``, in place: that of the folder ``saved`` if it has one.

    A new head is zero, so every value is 0 and the body gets no gradient from it before its first update.
    Raises ModelError for a saved head of another width.
    """
    inner = base(model)
    embedding = inner.get_input_embeddings().weight
    width = inner.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, device=embedding.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    inner.add_module(NAME, head)
    if saved is not None and (saved / FILE).is_file() and not head.weight.is_meta:
        _load(head, saved / FILE)


def _load(head: nn.Linear, file: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(file)
    expected = head.state_dict()
    if {name: x.shape for name, x in stored.items()} != {name: x.shape for name, x in expected.items()}:
        shapes = {name: list(x.shape) for name, x in stored.items()}
        raise ModelError(
            f"{file} is not the value head of this model: expected a weight of shape [1, {head.in_features}] and a bias, "
            f"found {shapes}.\n  Copy the folder again, or delete the file to start with a new value head."
        )
    head.load_state_dict(stored)


def find(model: PreTrainedModel) -> nn.Linear | None:
    """Return the value head of ``model``, None if it has none."""
    head = submodule(base(model), NAME)
    return head if isinstance(head, nn.Linear) else None


def values_at(model: PreTrainedModel, hidden: Tensor | None, stop_gradient: bool = False) -> Tensor:
    """Return the value at each of the ``hidden`` states (n, width), (n,), computed in fp32 or wider.

    ``hidden``: as in ``log_probs.AtTargets``. ``stop_gradient``: the body learns nothing from the values. Raises
    ModelError without hidden states."""
    head = find(model)
    assert head is not None, "the network has no value head"
    if hidden is None:
        raise ModelError(
            f"{type(base(model)).__name__} does not say which layer is its output layer, so a value head has no input.\n"
            "  Take another model, or objective: grpo, which has no value model."
        )
    hidden = hidden.detach() if stop_gradient else hidden
    exact = lm_head.exact_dtype(hidden)
    weight, bias = head.weight.to(exact), head.bias.to(exact)
    return nn.functional.linear(hidden.to(weight.device, exact), weight, bias).squeeze(-1)


@contextmanager
def set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Take the value head out of ``model`` inside the block, which saves the model alone."""
    head, inner = find(model), base(model)
    if head is not None:
        delattr(inner, NAME)
    try:
        yield
    finally:
        if head is not None:
            inner.add_module(NAME, head)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the value head of ``model``, if it has one, into ``folder``."""
    from safetensors.torch import save_file

    if (head := find(model)) is not None:
        save_file({name: x.detach().cpu() for name, x in head.state_dict().items()}, folder / FILE)
