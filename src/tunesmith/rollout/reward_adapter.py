"""A reward model that is a second adapter of the policy's network: no second copy of the base in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.data.batch.pack import Batch, to_device
from tunesmith.models.adapters import second_adapter
from tunesmith.models.find import headers
from tunesmith.models.heads import head_types, lm_head
from tunesmith.models.network import pooling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tunesmith.models.find.locate import Folder
    from tunesmith.rollout.session_protocol import Session

PREFIX = "reward_"
"""Beginning of peft's name of the adapter."""

HEADS = tuple(f"{name}." for name in head_types.NEW_HEADS)
"""Beginnings of the names of a head's tensors."""


@dataclass(frozen=True)
class RewardAdapter:
    """The reward model: its adapter ``name`` in the network of ``run``, and its head."""

    run: Session
    name: str
    head: nn.Linear

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return (rows, labels). Afterwards the policy's adapter is in use, also after an exception."""
        policy = self.run.model
        with self.run.own_layers(), second_adapter.in_use(policy, self.name):
            hidden = lm_head.outputs_at(policy, to_device(batch, self.run.device))
        logits: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return logits


def why_not(policy: PreTrainedModel, folder: Folder, config: PreTrainedConfig) -> str | None:
    """Return why the reward model of ``folder`` needs a network of its own, or None.

    ``config``: that of the reward model. It can be attached if it is a LoRA on a base with the fingerprint of
    the policy's, and its head is one linear layer at the last token.
    """
    if pooling(config) == "mean":
        return "its head reads the mean over all tokens"
    if why := second_adapter.why_not(policy, folder, HEADS):
        return why
    if sum(name.endswith(".weight") for name in _head_names(folder)) != 1:
        return "its head is not one linear layer"
    return None


def attach(run: Session, folder: Folder, name: str) -> RewardAdapter:
    """Attach the reward model of ``folder`` to the policy's network. Expects that :func:`why_not` is None."""
    name = PREFIX + name.replace(".", "_")  # peft refuses a dot
    tensors = second_adapter.attach(run.model, folder, name)
    found = {key.rpartition(".")[2]: tensors[key] for key in _head_names(folder)}
    weight = found["weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in found, device="meta")
    head.load_state_dict(found, assign=True)  # a head on another device would draw random numbers
    exact = lm_head.exact_dtype(run.model.get_input_embeddings().weight)
    return RewardAdapter(run, name, head.to(run.device, exact).requires_grad_(False))


def _head_names(folder: Folder) -> list[str]:
    """Names of the head's tensors in the adapter's file."""
    names = headers.read_tensors(folder.path, "adapter_model")
    return [name for name in names if name.removeprefix(second_adapter.WRAPPER).startswith(HEADS)]
