"""The local model store: one folder for each pulled model, put in place whole or not at all.

A model is made in a temporary folder beside its place. Its manifest, with the size and sha256 of every file, is written
last; then everything is flushed to disk and the folder renamed. So an entry without a manifest, or with a file that differs
from it, was interrupted or damaged, and pulling again mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.errors import DiskFullError, ModelError

MANIFEST = "manifest.json"
_ABANDONED = 3600.0
"""Seconds without a write after which the temporary folder of an interrupted pull is removed."""

_FORGOTTEN = 30 * 24 * 3600.0
"""Seconds after which nobody will go on with a download."""


def home() -> Path:
    """Where tunesmith keeps what it downloads and prepares: $TUNESMITH_HOME, else ~/.cache/tunesmith."""
    return Path(os.environ.get("TUNESMITH_HOME") or Path.home() / ".cache" / "tunesmith").expanduser()


def models() -> Path:
    return home() / "models"


def folder_of(name: str) -> Path:
    """The place of a model in the store, whether it is there or not. ``org/name`` becomes ``org--name``."""
    return models() / name.replace("/", "--")


def names() -> list[str]:
    """The names of the models in the store, whole or damaged."""
    if not models().is_dir():
        return []
    return sorted(path.name.replace("--", "/") for path in models().iterdir() if path.is_dir() and path.name[0] != ".")


def manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store entry; None when it is absent or unreadable."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else None


def problems(folder: Path, deep: bool = False) -> list[str]:
    """What is wrong with a store entry: files missing or of another size; with ``deep`` also of another sha256."""
    listed = manifest(folder)
    if listed is None:
        return [f"{MANIFEST} is missing or unreadable"]
    found = []
    for name, expected in listed["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            found.append(f"{name} has {path.stat().st_size} bytes, expected {expected['size']}")
        elif deep and sha256(path) != expected["sha256"]:
            found.append(f"{name} has another sha256")
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def workshop(name: str, needed: int) -> Iterator[Path]:
    """A temporary folder in the store, removed at the end. DiskFullError when fewer than ``needed`` bytes are free."""
    models().mkdir(parents=True, exist_ok=True)
    for old in models().glob(".pull-*"):
        if max(path.lstat().st_mtime for path in [old, *old.rglob("*")]) < time.time() - _ABANDONED:
            shutil.rmtree(old, ignore_errors=True)
    _require_space(name, needed)
    folder = Path(tempfile.mkdtemp(prefix=f".pull-{name.replace('/', '--')}-", dir=models()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial(name: str, revision: str, size: int) -> Path:
    """The folder that a download of ``size`` bytes fills: it outlives an interruption, and the next pull goes on in it.

    Downloads of another revision, and those nobody went on with for a month, are removed. Raises DiskFullError.
    """
    models().mkdir(parents=True, exist_ok=True)
    folder = models() / f".part-{name.replace('/', '--')}-{revision[:12]}"
    for old in models().glob(".part-*"):
        other = old.name.rpartition("-")[0] == folder.name.rpartition("-")[0] and old != folder
        if other or old.stat().st_mtime < time.time() - _FORGOTTEN:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    missing = size - sum(path.stat().st_size for path in folder.iterdir())
    _require_space(name, missing)
    return folder


def git_sha1(path: Path) -> str:
    """The name that git, and so the Hub, gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def install(made: Path, name: str, source: dict[str, Any]) -> Path:
    """Move a finished folder into the store under ``name``: hash, manifest, flush, rename. A damaged entry is replaced."""
    files = {}
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        files[path.relative_to(made).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _flush(path)
    text = json.dumps({"format": 1, "name": name, "source": source, "files": files}, indent=1)
    (made / MANIFEST).write_text(text, encoding="utf-8")
    _flush(made / MANIFEST)
    for directory in [made, *(path for path in made.rglob("*") if path.is_dir())]:
        _flush(directory)
    made.chmod(0o755)
    place = folder_of(name)
    if place.exists():
        trash = Path(tempfile.mkdtemp(prefix=".pull-old-", dir=models()))
        place.rename(trash / "old")
        shutil.rmtree(trash, ignore_errors=True)
    made.rename(place)
    _flush(models())
    return place


def unpack(archive: Path, member: str, into: Path) -> Path:
    """Copy one file, or one folder with all it holds, out of a zip (a wheel is one). Returns its path under ``into``.

    Only plain files with relative names that stay inside ``into`` are written. Raises ModelError otherwise.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [info for info in opened.infolist() if info.filename == member or info.filename.startswith(member + "/")]
            for info in found:
                name = PurePosixPath(info.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
                    raise ModelError(f"{archive.name} holds {info.filename!r}, a name that leaves the folder it is unpacked into")
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise ModelError(f"{archive.name} holds a link, {info.filename!r}; expected plain files")
                if info.is_dir():
                    continue
                target = into.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{archive.name} is damaged: {error}. Pull the model again.") from None
    if not found:
        raise ModelError(f"{archive.name} does not hold {member}")
    return into / member


def _require_space(name: str, needed: int) -> None:
    free = shutil.disk_usage(models()).free
    if free < needed:
        raise DiskFullError(
            f"{models()} has {free / 1e6:.0f} MB free; pulling {name} needs {needed / 1e6:.0f} MB.\n"
            "  Free some space, or set TUNESMITH_HOME."
        )


def _flush(path: Path) -> None:
    """fsync a file, or on POSIX a folder, so that a rename after it survives a power cut."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
