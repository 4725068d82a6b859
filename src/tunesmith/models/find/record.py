"""``tunesmith.json``, the record beside saved weights: their base, a hash of each file, the head. Read without a network.

``models.load.probe`` writes it, because the answers in it need the model in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.files import sha256
from tunesmith.models.find import headers

FILE = "tunesmith.json"
_SAMPLE = 4096
"""Bytes hashed at the start, the middle and the end of each tensor."""


def fingerprint(folder: Path) -> str:
    """A hash of a full model that does not depend on how it is sharded: names, dtypes, shapes, and samples of every tensor.

    Reads about 12 kB of each tensor, so it takes milliseconds; a training step changes every sample it reaches.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(headers.read_tensors(folder).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as file:
            for offset in (0, max(0, tensor.size // 2 - _SAMPLE // 2), max(0, tensor.size - _SAMPLE)):
                file.seek(tensor.start + offset)
                digest.update(file.read(min(_SAMPLE, tensor.size - offset)))
    return digest.hexdigest()


def files(folder: Path) -> dict[str, str]:
    """What is kept of the saved weights: of an adapter a sha256 of each file and of its config, of a full model its fingerprint.

    The config counts as JSON, whatever its spaces, and without the path of the base, which may move and is compared by itself.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return {"*.safetensors": fingerprint(folder)}
    found = {}
    for path in headers.weight_files(folder, "adapter_model"):
        found[path.name] = sha256(path)
    settings = headers.read_json(config) | {"base_model_name_or_path": None}
    return found | {config.name: hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


def read(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty when there is none (a folder that tunesmith did not write)."""
    return headers.read_json(folder / FILE) if (folder / FILE).is_file() else {}


def head(folder: Path) -> dict[str, Any]:
    """``type`` (score, token, span) and ``config`` of an adapter's head: an adapter brings no config.json. Empty for a language
    model, and for an adapter that tunesmith did not write."""
    return read(folder).get("head") or {}


def check_base(adapter: Path, base: Path) -> None:
    """Raise ModelError when ``base`` is not the model that the adapter was trained on. Nothing is known of foreign adapters."""
    recorded = read(adapter).get("base") or {}
    expected = recorded.get("fingerprint")
    if expected and fingerprint(base) != expected:
        name = recorded.get("name") or recorded.get("path")
        raise ModelError(
            f"{adapter} was trained on another model than {base}: the weights of {name} changed or come from another source.\n"
            "  Put back the model that it was trained on (for a catalog model: the same source), or train the adapter again."
        )


def check_files(folder: Path) -> None:
    """Raise ModelError when the weights are not the files that were saved. Of a folder that kept no hashes nothing is known."""
    saved = read(folder).get("files")
    if not saved:
        return
    now = files(folder)
    if changed := sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name)):
        raise ModelError(
            f"{folder}: {', '.join(changed)} changed since the model was saved: its sha256 is another one.\n"
            f"  Copy the folder again. If you changed it on purpose, take `files` and `probe` out of {FILE} there."
        )
