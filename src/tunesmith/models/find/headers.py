"""Read the JSON files of a model folder and the headers of its safetensors files. No weight is read.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors one after
the other: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject

LARGEST_JSON = 2**26
"""Most bytes of a JSON file. A large tokenizer.json has 2**25."""

LARGEST_HEADER = 2**25
"""Most bytes of a safetensors header: about 300,000 tensors."""

DEEPEST_JSON = 100
"""Most levels of nested lists and mappings in a JSON file."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

SETTINGS_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Configs, vocabularies (``.txt``, ``.model``) and chat templates; no pickles and no Python files."""


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
    """Read a JSON object.

    Raises ModelError with file, line and column; also if it is too large or nested too deep.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ModelError(f"{path} has {size:,} bytes; expected at most {LARGEST_JSON:,}")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise ModelError(f"{where}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # a number with thousands of digits
        raise ModelError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        value = None
    if value is None or _is_deeper(value, DEEPEST_JSON):
        raise ModelError(f"{path}: expected JSON of at most {DEEPEST_JSON} levels, found a deeper one")
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    """Return whether lists and mappings are nested deeper than ``levels``.

    Libraries copy settings recursively.
    """
    level = [value]
    for _ in range(levels):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_text(path: Path, most: int) -> str:
    """Return the first ``most`` characters of a text file. Raises ModelError."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(most)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_json_if_present(path: Path) -> JsonObject:
    """Read a JSON object, {} when there is no such file. Raises ModelError as ``read_json`` does."""
    return read_json(path) if path.is_file() else {}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return a safetensors file's tensors by name, in file order. Raises ModelError for a corrupt file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"), path.open("rb") as file:  # compares the header with the file
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ModelError(
                    f"{path} has a header of {length:,} bytes; expected at most {LARGEST_HEADER:,}"
                )
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        reason = f"it was cut short, changed or unreadable ({error})"
        advice = "Copy or download it again."
        raise ModelError(f"{path} is not a whole safetensors file: {reason}.\n  {advice}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), 8 + length + begin
        tensors[name] = TensorHeader(entry["dtype"], shape, path, start, end - begin)
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
