"""The recipe's ``device_map``: which device each layer is on, and whether training can work there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunesmith.errors import RecipeError
from tunesmith.train import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def device_of(device_map: str | dict[str, int | str] | None, default: torch.device) -> torch.device:
    """Return the device of the batches: the first of the map, or ``default`` for a strategy of accelerate.

    Raises RecipeError for a map without a device of this machine, for a mixture of GPU and CPU,
    and with several processes, each of which has its own device.
    """
    if device_map is None:
        return default
    if (processes := distributed.state().num_processes) > 1:
        raise RecipeError(
            f"device_map: expected one process, found {processes}. Each process has its own device: leave the key out."
        )
    if device_map in STRATEGIES:
        return default
    devices = [
        _device(name) for name in ([device_map] if isinstance(device_map, str) else device_map.values())
    ]
    if not devices:
        raise RecipeError('device_map names no device. Write device_map: auto, or device_map: {"": cpu}')
    types = {device.type for device in devices}
    if len(types) > 1:
        raise RecipeError(
            f"device_map mixes {' and '.join(sorted(types))}: layers that are offloaded from the GPU cannot be trained"
        )
    return devices[0]


def check(model: PreTrainedModel) -> None:
    """Raise RecipeError when a layer is where it cannot be trained: not in the map, or too large for the
    GPUs."""
    examples: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        examples.setdefault(parameter.device.type, name)
    if len(examples) > 1 or "meta" in examples:
        found = ", ".join(
            f"{name} {'offloaded to memory or disk' if device == 'meta' else f'on {device}'}"
            for device, name in examples.items()
        )
        raise RecipeError(
            f"device_map: {found}. Layers can be trained only on a GPU together with the others.\n"
            "  Name every layer in the map, take a smaller model, or leave device_map out."
        )


def _device(name: int | str) -> torch.device:
    try:
        device = torch.device(f"cuda:{name}" if isinstance(name, int) else name)
    except RuntimeError:
        expected = ", ".join(STRATEGIES)
        raise RecipeError(
            f"device_map: {name!r} is no device. Expected {expected}, or a device such as cpu or cuda:0"
        ) from None
    count = torch.cuda.device_count()
    if device.type == "meta" or (device.type == "cuda" and (device.index or 0) >= count):
        raise RecipeError(f"device_map: {name!r}: this machine has {count} GPUs and a cpu")
    return device
