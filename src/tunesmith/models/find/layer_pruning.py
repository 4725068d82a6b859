"""Make a smaller model of some layers of another: same embeddings, head, tokenizer and shapes.

Nothing is computed, so the same base model always gives the same weights. The result answers nothing useful
until it is trained; it is for studies that compare sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers

_LAYER = re.compile(r"((?:.*\.)?(?:layers|h|layer|blocks)\.)(\d+)(\..*)")
_COUNTS = ("num_hidden_layers", "n_layer")
_NOT_COPIED = ("manifest.json", "tunesmith.json", "model.safetensors.index.json")


def copy_layers(base: Path, layers: Sequence[int], folder: Path) -> Path:
    """Write the model in ``base`` with only ``layers``, by number and in order, into the new ``folder``.

    Dtypes and values are kept. Raises ModelError when ``base`` lacks one of the layers.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = headers.read_json(base / "config.json")
    count = next((int(config[key]) for key in _COUNTS if key in config), 0)
    if not all(0 <= layer < count for layer in layers):
        requested = ", ".join(map(str, layers))
        raise ModelError(f"{base} has {count} layers, and the layers {requested} were requested")
    new_number = {old: new for new, old in enumerate(layers)}
    tensors = {}
    for path in headers.weight_files(base):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                layer = _LAYER.fullmatch(name)
                if layer is None:
                    tensors[name] = file.get_tensor(name)
                elif int(layer[2]) in new_number:
                    tensors[f"{layer[1]}{new_number[int(layer[2])]}{layer[3]}"] = file.get_tensor(name)
    folder.mkdir()
    headers.copy_settings(base, folder, skip=_NOT_COPIED)
    smaller = json.dumps(_smaller_config(config, layers, count), indent=2)
    (folder / "config.json").write_text(smaller, encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _smaller_config(config: JsonObject, layers: Sequence[int], count: int) -> JsonObject:
    """Return ``config`` with the new number of layers and per-layer lists cut to them."""
    smaller = dict(config)
    for key, value in config.items():
        if key in _COUNTS:
            smaller[key] = len(layers)
        elif isinstance(value, list) and len(value) == count and key.startswith("layer"):
            smaller[key] = [value[layer] for layer in layers]
    return smaller
