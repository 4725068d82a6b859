"""Processed rows on disk, keyed by content and memory-mapped: a folder for each source, written once.

For every array name of the examples, a folder holds the values end to end (``input_ids.values``) and where
each example begins (``input_ids.starts``, int64[n + 1]). ``row``, ``targets``, ``length``, ``digest``
and ``group`` have one number for each example. ``manifest.json`` has the size and sha256 of each file. A folder
is written under another name and renamed when complete. So two processes may write the same one, and a crash
cannot leave half of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tunesmith import files
from tunesmith.data.batch.pack import Example
from tunesmith.errors import DiskFullError, UserError
from tunesmith.json_types import JsonObject

VERSION = 3
ALIGNED = ("input_ids", "supervised", "token_type_ids")
"""Arrays with one number for each token: a length policy cuts them with the tokens."""
ABANDONED_SECONDS = 2 * 24 * 3600.0  # an unfinished folder of this age belongs to no living process
NUMBERS = {"row": "<i4", "targets": "<i4", "length": "<i4", "digest": "<u8", "group": "<u8"}
"""Numbers kept for each example, and their types."""
SIZES = {name: np.dtype(kind).itemsize for name, kind in NUMBERS.items()}
BUFFER_BYTES = 1 << 16  # held in memory of each file that is being written


class Scratch:
    """A temporary folder, ``name``, that is removed with this object.

    tempfile's ``TemporaryDirectory`` needs a ``with`` block: it warns when its object ends without one.
    """

    def __init__(self, prefix: str) -> None:
        self.name = tempfile.mkdtemp(prefix=prefix)
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """One processed source, mapped read-only.

    ``values[name]`` and ``starts[name]`` (int64[n + 1]) hold the examples. ``row`` (row of the file, from 1),
    ``targets`` (loss units), ``length``, ``digest`` (of the row's content) and ``group`` (``rows.group_key``)
    have one number for each example. ``info``: the counts of when it was written.
    """

    values: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]
    row: np.ndarray
    targets: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    group: np.ndarray
    info: JsonObject

    def __len__(self) -> int:
        return len(self.row)

    def example(self, index: int, start: int, length: int) -> Example:
        """Example ``index``, or the part of it that a length policy kept. Views of the file, no copy."""
        whole = int(self.length[index])
        out = {}
        for name, values in self.values.items():
            begin, end = int(self.starts[name][index]), int(self.starts[name][index + 1])
            if length < whole and name in ALIGNED:
                begin, end = begin + start, begin + start + length
            out[name] = values[begin:end]
        return out


class Writer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {
            name: (folder / name).open("wb", BUFFER_BYTES) for name in NUMBERS
        }
        self._ends: dict[str, int] = {}
        self._dtypes: dict[str, str] = {}

    def add(self, examples: Iterable[Example], row: int, digest: int, group: int = 0) -> None:
        """Append the examples of one row. ``group`` is not used where nothing is held out."""
        for example in examples:
            if not self._ends:
                self._begin(example)
            if example.keys() != self._ends.keys():
                raise ValueError(
                    f"an example has the arrays {sorted(example)}, the ones before had {sorted(self._ends)}"
                )
            for name, values in example.items():
                if values.dtype.str != self._dtypes[name]:
                    raise ValueError(f"array {name!r}: {values.dtype} after {np.dtype(self._dtypes[name])}")
                self._files[f"{name}.values"].write(np.ascontiguousarray(values).tobytes())
                self._ends[name] += len(values)
                self._write_number(f"{name}.starts", self._ends[name])
            numbers = {"row": row, "digest": digest, "group": group}
            numbers |= {"targets": targets(example), "length": length(example)}
            for name, number in numbers.items():
                self._write_number(name, number)

    def _begin(self, example: Example) -> None:
        for name, values in example.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"array name {name!r} cannot be part of a file name")
            for part in (f"{name}.values", f"{name}.starts"):
                self._files[part] = (self.folder / part).open("wb", BUFFER_BYTES)
            self._write_number(f"{name}.starts", 0)
            self._ends[name] = 0
            self._dtypes[name] = values.dtype.str

    def _write_number(self, file: str, number: int) -> None:
        self._files[file].write(number.to_bytes(SIZES.get(file, 8), "little"))

    def close(self, info: JsonObject) -> None:
        """Write the manifest last; when this returns, everything is on the disk."""
        closed = {}
        for name, file in self._files.items():
            with file:
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / name
            closed[name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
        manifest: JsonObject = {"version": VERSION, "arrays": self._dtypes, "files": closed, "info": info}
        with (self.folder / "manifest.json").open("w", encoding="utf-8") as handle:
            json.dump({**manifest, "sha256": _hash_of(manifest)}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        files.sync(self.folder)

    def abandon(self) -> None:
        """Close the files and remove the folder, unless it was renamed to its target."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk takes no last buffer either
                file.close()
        if self.folder.exists():
            shutil.rmtree(self.folder)


def targets(example: Example) -> int:
    """Loss units: supervised tokens but the first (no token predicts it), words that have a tag, else 1.

    Several answers to one prompt are one unit: their loss compares them."""
    if "supervised" in example and "answers" not in example:
        return int(np.count_nonzero(example["supervised"][1:]))
    return len(example["places"]) if "places" in example and "input_ids" in example else 1


def length(example: Example) -> int:
    """Tokens of an example: of ``input_ids``, else of its longest array."""
    return len(example["input_ids"]) if "input_ids" in example else max(map(len, example.values()))


def store() -> Path:
    """The folder ``data`` of tunesmith's home. Anything in it may be deleted at any time."""
    return files.home() / "data"


def begin(folder: Path) -> Writer:
    """Return a writer into a new folder next to ``folder``, and remove abandoned folders there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.remove_abandoned(folder.parent, ".*.*", ABANDONED_SECONDS)
        return Writer(files.temporary_folder(folder, 0o700))
    except OSError as error:
        raise disk_error(error, folder.parent) from None


def finish(writer: Writer, folder: Path, info: JsonObject) -> None:
    """Complete the writer's folder and rename it to ``folder``, unless another process was first."""
    writer.close(info)
    try:
        os.rename(writer.folder, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        files.remove_folder(writer.folder)
    files.sync(folder.parent)


def load(folder: Path) -> Entry | None:
    """The entry at ``folder``; None without one, or if the size or hash of a file differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _hash_of(manifest) or manifest["version"] != VERSION:
            return None
        arrays: dict[str, str] = manifest["arrays"]
        kinds = {f"{name}.values": dtype for name, dtype in arrays.items()}
        kinds |= {f"{name}.starts": "<i8" for name in arrays}
        kinds |= NUMBERS
        mapped = {name: _map(folder / name, manifest["files"][name], dtype) for name, dtype in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    values, starts = ({name: mapped[f"{name}.{part}"] for name in arrays} for part in ("values", "starts"))
    return Entry(values, starts, **{name: mapped[name] for name in NUMBERS}, info=manifest["info"])


def _hash_of(manifest: JsonObject) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _map(path: Path, recorded: JsonObject, dtype: str) -> np.ndarray:
    """Map the file as an array. Raises ValueError when it is not what the manifest records."""
    size = path.stat().st_size
    # sha256 reads the file and does not map it: pages that are only checked need not stay in memory.
    if size != recorded["size"] or files.sha256(path) != recorded["sha256"]:
        raise ValueError(f"{path} is not what was written")
    if not size:
        return np.empty(0, dtype)
    with path.open("rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def forget(values: np.ndarray) -> None:
    """Remove the pages of a mapped array from this process's memory; the next access reads them again."""
    held = values.base
    while held is not None and not isinstance(held, mmap.mmap):
        held = held.obj if isinstance(held, memoryview) else held.base
    if held is not None and sys.platform != "win32":
        held.madvise(mmap.MADV_DONTNEED)


def disk_error(error: OSError, folder: Path) -> OSError | DiskFullError | UserError:
    """Return the error to raise for ``error``, which was met while writing under ``folder``."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return UserError(
            f"processed data cannot be written to {folder}: {error.strerror}. Set TUNESMITH_HOME to a folder that can be written."
        )
    if error.errno not in files.FULL:
        return error
    return DiskFullError(
        f"no room for processed data in {folder}. Free some space, or set TUNESMITH_HOME to another disk."
    )
