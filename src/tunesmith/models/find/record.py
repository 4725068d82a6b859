"""``tunesmith.json``, the record next to saved weights: their base model, a hash of each file, the head.

``models.load.probe`` writes it, because it also records logits, which need the model in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.files import replace_file, sha256
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers

FILE = "tunesmith.json"

FORMAT = 2
"""Version of the record. Format 1 has hashes only of the weights, and none of the record itself."""

_SAMPLE_BYTES = 4096
"""Hashed at the start, the middle and the end of each tensor."""


def fingerprint(folder: Path, whole: bool = False) -> str:
    """Return a hash of a full model's weights that does not depend on their sharding.

    It covers name, dtype and shape of every tensor, and three samples of it, 12 kB together: it takes
    milliseconds. ``whole``: all bytes, which takes a second for each GB.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(headers.read_tensors(folder).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        middle, last = tensor.size // 2 - _SAMPLE_BYTES // 2, tensor.size - _SAMPLE_BYTES
        step = 2**20 if whole else _SAMPLE_BYTES
        starts = range(0, tensor.size, step) if whole else (0, max(0, middle), max(0, last))
        with tensor.file.open("rb") as file:
            for offset in starts:
                file.seek(tensor.start + offset)
                digest.update(file.read(min(step, tensor.size - offset)))
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return a hash of a model: a full model's fingerprint, or an adapter's sha256 of weights and config.

    The config is hashed as JSON, so spaces do not count; nor does the base model's path, which may move.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return {"*.safetensors": fingerprint(folder)}
    hashes = {path.name: sha256(path) for path in headers.weight_files(folder, "adapter_model")}
    settings = headers.read_json(config) | {"base_model_name_or_path": None}
    return hashes | {config.name: hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


def read(folder: Path) -> JsonObject:
    """Return the record of a folder; {} for a folder that tunesmith did not write.

    Raises ModelError when the record was changed: it has its own sha256.
    """
    file = folder / FILE
    written = headers.read_json_if_present(file)
    if written and written.get("format") != 1 and written.get("sha256") != _hash(written):
        raise ModelError(
            f"{file} changed since it was written: its sha256 differs.\n"
            f"  Copy the folder again. If you changed it on purpose, type: tunesmith verify {folder} --accept"
        )
    return written


def write(folder: Path, facts: JsonObject) -> None:
    """Write the record of a folder, with its own sha256."""
    facts = json.loads(json.dumps(facts)) | {"format": FORMAT}
    replace_file(folder / FILE, json.dumps(facts | {"sha256": _hash(facts)}, indent=1).encode())


def _hash(facts: JsonObject) -> str:
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def head(folder: Path) -> JsonObject:
    """Return ``type`` (score, token, span) and ``config`` of an adapter's head.

    {} for a language model, and for an adapter that tunesmith did not write.
    """
    return read(folder).get("head") or {}


def trained(folder: Path) -> JsonObject:
    """Return how a folder's model was trained; {} for a model that no run of tunesmith saved.

    ``objective``: type and keys. ``readings``: for each training source the keys of the recipe that say how
    it was read (format, columns, separator, prompt_template), if there were any. ``rows``: names of its row
    types. ``max_length``: that of the recipe, or None. ``start``: the model that training started from, with
    its ``file_hashes``; ``exact``: it was the policy of step 0, without random virtual tokens or new tokens.
    """
    return read(folder).get("trained") or {}


def check_base(adapter: Path, base: Path) -> None:
    """Raise ModelError when the adapter's record names another base model than ``base``."""
    recorded = read(adapter).get("base") or {}
    expected = recorded.get("fingerprint")
    if expected and fingerprint(base) != expected:
        name = recorded.get("name") or recorded.get("path")
        raise ModelError(
            f"{adapter} was trained on another model than {base}: the weights of {name} changed or come "
            "from another source.\n"
            "  Restore the model it was trained on (a catalog model: from the same source), or train again."
        )
