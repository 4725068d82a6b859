"""What a model folder says about itself without a weight being read: its JSON files and the headers of its safetensors.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors side by side. Everything
here is checked against the size of the file, so a truncated or forged one is refused before any library opens it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors file. ``start`` is its offset in ``file`` in bytes, ``size`` its length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def count(self) -> int:
        return prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises ModelError naming file, line and column."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> Tensor of one safetensors file, in file order. Raises ModelError when header and file do not agree."""
    try:
        with path.open("rb") as file:
            total = path.stat().st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 0 < length <= min(_LONGEST_HEADER, total - 8):
                raise _broken(path, f"its header should be {length} bytes long, and the file has {total}")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)))
    at = 8 + length
    for name, tensor in tensors.items():
        if tensor.start != at:
            raise _broken(path, f"tensor {name} starts at byte {tensor.start}, expected {at}")
        at += tensor.size
    if at != total:
        raise _broken(
            path, f"its tensors end at byte {at}, and the file has {total}: it was cut short or written to"
        )
    return tensors


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: ``stem.safetensors``, or the shards its index names. Empty when there are none."""
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
            raise ModelError(f"{index} names {shard}, which is not there. Copy or download the folder again.")
    return [folder / shard for shard in shards]


def read_tensors(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors, by name, whatever the number of shards."""
    out: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        out |= read_header(path)
    return out


def pickles(folder: Path) -> list[Path]:
    """Weight files of the folder in a format that runs code when it is opened."""
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = (
            isinstance(dtype, str)
            and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise _broken(path, f"the entry of tensor {name} is not understood")
    if dtype in _BYTES and end - begin != prod(shape) * _BYTES[dtype]:
        raise _broken(path, f"tensor {name} has {end - begin} bytes, expected {prod(shape) * _BYTES[dtype]}")
    return Tensor(dtype, shape, path, data + begin, end - begin)


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {reason}.\n  Copy or download it again.")
