"""Read the JSON files of a model folder and the headers of its safetensors files. No weight is read.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors one after
the other. Each header is checked against the size of its file, so that a truncated or forged file is refused
before a library opens it. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

SETTINGS_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Configs, vocabularies (``.txt``, ``.model``) and chat templates; no pickles and no Python files."""

_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
_LONGEST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a safetensors file. ``start`` (its offset in ``file``) and ``size`` are in bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def count(self) -> int:
        return prod(self.shape)


def read_json(path: Path) -> JsonObject:
    """Read a JSON object. Raises ModelError naming file, line and column."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_present(path: Path) -> JsonObject:
    """Read a JSON object, {} when there is no such file. Raises ModelError as ``read_json`` does."""
    return read_json(path) if path.is_file() else {}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return a safetensors file's tensors by name, in file order. Raises ModelError for a corrupt file."""
    try:
        with path.open("rb") as file:
            total = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(_LONGEST_HEADER_BYTES, total - 8):
                raise _corrupt(path, f"its header should have {length} bytes, and the file has {total}")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)))
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.start != end:
            raise _corrupt(path, f"tensor {name} starts at byte {tensor.start}, expected {end}")
        end += tensor.size
    if end != total:
        raise _corrupt(
            path, f"its tensors end at byte {end}, and the file has {total}: it was cut short or written to"
        )
    return tensors


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return ``stem.safetensors``, or the shards that its index names; [] when the folder has neither."""
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: expected `weight_map` to map tensor names to file names")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} names {shard!r}; expected a .safetensors file of the same folder")
        if not (folder / shard).is_file():
            raise ModelError(f"{index} names {shard}, which is missing. Copy or download the folder again.")
    return [folder / shard for shard in shards]


def read_tensors(folder: Path, stem: str = "model") -> dict[str, TensorHeader]:
    """Return every tensor of a folder's safetensors files by name."""
    return {name: tensor for path in weight_files(folder, stem) for name, tensor in read_header(path).items()}


def pickle_files(folder: Path) -> list[Path]:
    """Return the files whose format runs code when it is opened."""
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)


def copy_settings(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Copy config, tokenizer and template files, but none whose name ends in one of ``skip``."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in SETTINGS_SUFFIXES and not path.name.endswith(skip):
            shutil.copyfile(path, target / path.name)


def _parse_entry(path: Path, name: str, entry: JsonObject, data: int) -> TensorHeader:
    """``entry``: not validated yet. ``data``: the byte of the file from which offsets count."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = (
            isinstance(dtype, str)
            and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise _corrupt(path, f"the entry of tensor {name} is not valid")
    if dtype in _BYTES and end - begin != prod(shape) * _BYTES[dtype]:
        raise _corrupt(path, f"tensor {name} has {end - begin} bytes, expected {prod(shape) * _BYTES[dtype]}")
    return TensorHeader(dtype, shape, path, data + begin, end - begin)


def _corrupt(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {reason}.\n  Copy or download it again.")
