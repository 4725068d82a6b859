"""Where a run's layers go when the recipe says so (``device_map``), and which of these places training can work in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunesmith.errors import RecipeError
from tunesmith.train import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def device_of(device_map: str | dict[str, int | str] | None, default: torch.device) -> torch.device:
    """The device that a run's batches go to: the one that the map names, or ``default`` when accelerate spreads the layers.

    Raises RecipeError for a map that names no device of this machine, or one where nothing can be trained, and with several
    processes, each of which has a device of its own.
    """
    if device_map is None:
        return default
    if distributed.state().num_processes > 1:
        raise RecipeError(
            "device_map puts layers where it says in every process; several processes need one device each. Leave it out."
        )
    if device_map in STRATEGIES:
        return default
    named = [device_map] if isinstance(device_map, str) else list(device_map.values())
    places = [_place(name) for name in named]
    if not places:
        raise RecipeError('device_map names no device. Write device_map: auto, or device_map: {"": cpu}')
    kinds = {place.type for place in places}
    if len(kinds) > 1:
        raise RecipeError(
            f"device_map mixes {' and '.join(sorted(kinds))}: layers kept off the GPU are only lent to it, not trained"
        )
    return places[0]


def check(model: PreTrainedModel) -> None:
    """Raise RecipeError when a layer is where it cannot be trained: left out of the map, or not fitting on the GPUs."""
    kinds: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(parameter.device.type, name)
    if len(kinds) > 1 or "meta" in kinds:
        places = {kind: "lent from memory or disk" if kind == "meta" else f"on {kind}" for kind in kinds}
        found = ", ".join(f"{name} {places[kind]}" for kind, name in kinds.items())
        raise RecipeError(
            f"device_map: {found}. What is not on a GPU with the rest cannot be trained.\n"
            "  Name every layer in the map, take a smaller model, or leave device_map out."
        )


def _place(name: int | str) -> torch.device:
    """A device of this machine."""
    try:
        place = torch.device(f"cuda:{name}" if isinstance(name, int) else name)
    except RuntimeError:
        expected = ", ".join(STRATEGIES)
        raise RecipeError(
            f"device_map: {name!r} is no device. Expected {expected}, or a device such as cpu or cuda:0"
        ) from None
    count = torch.cuda.device_count()
    if place.type == "meta" or (place.type == "cuda" and (place.index or 0) >= count):
        raise RecipeError(f"device_map: {name!r}: this machine has {count} GPUs and a cpu")
    return place
