"""A smaller model made of some layers of another: the same embeddings, head, tokenizer and shapes, fewer layers.

Nothing is computed, so the same base always gives the same weights. What comes out is no good model until it is trained: it is
there for studies that compare sizes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.models.find import headers

_LAYER = re.compile(r"((?:.*\.)?(?:layers|h|layer|blocks)\.)(\d+)(\..*)")
_COUNTS = ("num_hidden_layers", "n_layer")
_COPIED = (".json", ".txt", ".model", ".jinja")


def cut(base: Path, layers: Sequence[int], folder: Path) -> Path:
    """Write the model in ``base`` with only ``layers`` (their numbers in ``base``, in order) into the new folder ``folder``.

    Dtypes and values are kept. Raises ModelError when ``base`` lacks one of them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = headers.read_json(base / "config.json")
    count = next((int(config[key]) for key in _COUNTS if key in config), 0)
    if not all(0 <= layer < count for layer in layers):
        raise ModelError(f"{base} has {count} layers; {', '.join(map(str, layers))} are asked for")
    place = {old: new for new, old in enumerate(layers)}
    tensors = {}
    for path in headers.weight_files(base):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                found = _LAYER.fullmatch(name)
                if found is None:
                    tensors[name] = file.get_tensor(name)
                elif int(found[2]) in place:
                    tensors[f"{found[1]}{place[int(found[2])]}{found[3]}"] = file.get_tensor(name)
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix in _COPIED and path.name not in (
            "manifest.json",
            "tunesmith.json",
            "model.safetensors.index.json",
        ):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(
        json.dumps(_config(config, layers, count), indent=2), encoding="utf-8"
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(config: dict[str, Any], layers: Sequence[int], count: int) -> dict[str, Any]:
    """The config with as many layers; lists that say something of each layer keep what they say of those that stay."""
    out = dict(config)
    for key, value in config.items():
        if key in _COUNTS:
            out[key] = len(layers)
        elif isinstance(value, list) and len(value) == count and key.startswith("layer"):
            out[key] = [value[layer] for layer in layers]
    return out
