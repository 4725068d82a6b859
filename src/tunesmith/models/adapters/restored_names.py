"""Names under which peft restores the tensors of a saved adapter.

transformers renames weights of some architectures while it loads a checkpoint, and peft applies the same
patterns to the names of a saved LoRA. A pattern that also matches a part of the model's own names renames a
tensor to one that no module has, and peft leaves that module's LoRA untrained, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from tunesmith.models.adapters import adapter_types

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def unrestored_layers(
    adapted: PreTrainedModel, stored: Mapping[str, Sequence[int]] | None = None, name: str = "default"
) -> list[str]:
    """Return the layers whose adapter peft does not restore from a saved folder, sorted. No tensor is copied.

    ``stored``: name -> shape of the folder's tensors; None = those that peft would save now. ``name``: peft's
    name of the adapter.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import transformers_weight_conversion as conversion

    model = cast("PeftModel", adapted)
    # save_embedding_layers="auto" would ask the Hub for the base's vocabulary (peft#1452)
    live = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = {key: tensor.shape for key, tensor in live.items()} if stored is None else stored
    restored = conversion.convert_peft_adapter_state_dict_for_transformers(
        model=model,
        peft_config=model.peft_config[name],
        adapter_state_dict={key: torch.empty(*shape, device="meta") for key, shape in shapes.items()},
        adapter_name=name,
    )
    return adapter_types.layers_of(live.keys() - restored.keys())
