"""A frozen LoRA next to the trained one, on the same base in memory, in use only inside a block.

A reward model that is a LoRA on the policy's base needs no second copy of the base. peft keeps both adapters;
this module attaches the second one without changing which one is active or trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record
from tunesmith.models.find.locate import Folder
from tunesmith.models.load import load, vocabulary
from tunesmith.models.network import base, is_peft, peft_type, submodule

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

FACTORS = ("lora_A.weight", "lora_B.weight")
WRAPPER = "base_model.model."


def why_not(model: PreTrainedModel, folder: Folder, others: tuple[str, ...] = ()) -> str | None:
    """Return why the adapter of ``folder`` cannot be attached to the adapted network ``model``, or None.

    ``others``: beginnings of the names of its tensors that belong to no LoRA and are used elsewhere, such as
    ``score.``."""
    if folder.kind != "adapter" or folder.base is None:
        return "it is a whole model"
    if not is_peft(model) or peft_type(model.active_peft_config) != "LORA":
        return "the policy is not trained with a LoRA"
    path = base(model).name_or_path
    if record.fingerprint(folder.base) != _fingerprint(path):
        return f"its base {folder.base} has other weights than the policy's, {path}"
    config = headers.read_json(folder.path / "adapter_config.json")
    if adapter_types.type_of(config) != "LORA" or config.get("use_dora"):
        return "it is no plain LoRA"
    if config.get("bias", "none") != "none":
        return "it trained the biases of the base"
    if vocabulary.adapter_rows(folder.path):
        return "it adds tokens to the vocabulary"
    if record.read(folder.path).get("quantization"):
        return "it was trained on a quantised base"
    for name in headers.read_tensors(folder.path, "adapter_model"):
        inner = name.removeprefix(WRAPPER)
        layer = inner.removesuffix(f".{FACTORS[0]}").removesuffix(f".{FACTORS[1]}")
        if layer == inner:
            if not inner.startswith(others):
                return f"it trained {inner} whole"
        elif _linear(model, layer) is None:
            return f"the policy's network has no linear layer {layer}"
    return None


def _fingerprint(path: str) -> str | None:
    from pathlib import Path

    return record.fingerprint(Path(path)) if Path(path).is_dir() else None


def _linear(model: PreTrainedModel, name: str) -> nn.Linear | None:
    """Return the linear layer ``name`` of the base, inside any adapter that it has."""
    layer: nn.Module | None = base(model)
    for part in name.split("."):
        layer = None if layer is None else submodule(layer, part)
    inner = layer if layer is None else submodule(layer, "base_layer") or layer
    return inner if isinstance(inner, nn.Linear) else None


def attach(model: PreTrainedModel, folder: Folder, name: str) -> dict[str, Tensor]:
    """Add the LoRA of ``folder`` to ``model`` as the adapter ``name``, in place: frozen, and not in use.

    Return all tensors of the folder. Expects that :func:`why_not` returned None. Raises ModelError for tensors
    of another shape.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in headers.weight_files(folder.path, "adapter_model"):
        tensors |= load_file(file)
    stored = {key.removeprefix(WRAPPER): value for key, value in tensors.items() if key.endswith(FACTORS)}
    config = load.adapter_config(folder.path)
    layers = sorted({key.partition(".lora_")[0] for key in stored})
    config.target_modules = set(layers)  # from 20 names on, peft puts their common endings in their place
    config.task_type = model.active_peft_config.task_type  # else peft would look for a head
    config.modules_to_save = config.exclude_modules = config.layers_to_transform = None
    config.inference_mode, config.init_lora_weights = True, True
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with torch.random.fork_rng():  # peft draws initial values, which are replaced below
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(key, flags.get(key.replace(".base_layer.", "."), False)))
    for layer in layers:
        _fill(base(model).get_submodule(layer), layer, stored, name, folder)
    return tensors


@torch.no_grad()
def _fill(module: LoraLayer, layer: str, stored: Mapping[str, Tensor], name: str, folder: Folder) -> None:
    weight = module.base_layer.weight
    for kind in FACTORS:
        value, factor = stored[f"{layer}.{kind}"], module.get_submodule(kind.partition(".")[0])[name]
        if factor.weight.shape != value.shape:
            raise ModelError(
                f"{folder.path}: {layer}.{kind} has the shape {tuple(value.shape)}, and adapter_config.json makes it "
                f"{tuple(factor.weight.shape)}. Copy the folder again."
            )
        dtype = weight.dtype if weight.dtype.is_floating_point else value.dtype
        factor.weight = nn.Parameter(value.to(weight.device, dtype), requires_grad=False)


@contextmanager
def in_use(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use the adapter ``name`` inside the block; afterwards, whatever happened, the one before it again."""
    before = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter, trains in flags:
            parameter.requires_grad_(trains)
