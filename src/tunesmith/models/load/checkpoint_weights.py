"""The trained weights of a run's checkpoint, put into the model that the run saved.

A checkpoint holds the trained weights by the names of the network, in fp32; all other weights, the tokenizer and
the head's labels are those of the saved model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith import files
from tunesmith.errors import ModelError
from tunesmith.models.find import headers
from tunesmith.models.find.locate import Folder
from tunesmith.models.heads import head_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "state.safetensors"
PREFIX = "master."


def restore_checkpoint(network: PreTrainedModel, folder: Folder) -> PreTrainedModel:
    """Return the network with the trained weights of the folder's checkpoint, if it names one.

    Raises ModelError if the checkpoint is damaged, or if its weights are not those of this network."""
    if (checkpoint := folder.checkpoint) is None:
        return network
    import torch
    from safetensors import safe_open

    listed = headers.read_json(checkpoint / "manifest.json").get("files") or {}
    if files.sha256(checkpoint / STATE) != (listed.get(STATE) or {}).get("sha256"):
        raise ModelError(
            f"{checkpoint} is damaged: {STATE} does not match its checksum. Name another checkpoint."
        )
    parameters = dict(network.named_parameters())
    with safe_open(checkpoint / STATE, "pt") as state, torch.no_grad():
        for name in state.keys():  # noqa: SIM118 - a file of tensors is no mapping
            if not name.startswith(PREFIX):
                continue
            if f".{head_types.VALUE_HEAD}." in f".{name}":  # is needed for further training only
                continue
            parameter, saved = parameters.get(name.removeprefix(PREFIX)), state.get_tensor(name)
            if parameter is None or parameter.shape != saved.shape:
                raise ModelError(
                    f"{checkpoint} holds weights in another form than the saved model ({name.removeprefix(PREFIX)}), "
                    "so it cannot be opened as a model. Name the run folder."
                )
            parameter.copy_(saved)
    return network
