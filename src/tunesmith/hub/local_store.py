"""Local stores of pulled things: each entry is one folder, complete or absent.

An entry is made in a temporary folder next to its place. Its manifest, with the size and sha256 of every
file, is written last; then everything is flushed to disk and the folder is renamed. An entry without a
manifest, or with a file that differs from it, was interrupted or damaged, and another pull repairs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from tunesmith import files
from tunesmith.errors import DiskFullError, UserError
from tunesmith.json_types import JsonObject

MANIFEST = "manifest.json"
_ABANDONED = 30 * 24 * 3600.0
"""Seconds after which an interrupted download counts as abandoned."""


class DamagedFile(UserError):
    """A file that arrived does not have the hash that was listed."""


def manifest(folder: Path) -> JsonObject | None:
    """The manifest of an entry; None if it is absent or unreadable."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else None


def problems(folder: Path, deep: bool = False) -> list[str]:
    """Files of an entry that are missing or have another size; with ``deep`` also another sha256."""
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
        elif deep and files.sha256(path) != expected["sha256"]:
            found.append(f"{name} has another sha256")
    return found


def git_sha1(path: Path) -> str:
    """The name that git, and so the Hub, computes for a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check(path: Path, expected: str, owner: str) -> None:
    """Raise DamagedFile unless the file ``path`` of ``owner`` has the sha256 ``expected``."""
    if not path.is_file():
        raise DamagedFile(f"{owner} does not contain {path.name}")
    sha256 = files.sha256(path)
    if sha256 != expected:
        raise DamagedFile(
            f"{owner}: {path.name} has sha256 {sha256}, expected {expected}. It was damaged or changed; pull again."
        )


def partial(place: Path, revision: str, size: int) -> Path:
    """The folder next to ``place`` for a download of ``size`` bytes, which continues after an interruption.

    Removes downloads of other revisions, and those that nobody continued for a month. Raises
    DiskFullError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = place.parent / f".part-{place.name}-{revision[:12]}"
    files.remove_abandoned(place.parent, ".part-*", _ABANDONED)
    for old in place.parent.glob(".part-*"):
        if old.name.rpartition("-")[0] == folder.name.rpartition("-")[0] and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    require_space(place, size - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    return folder


def install(made: Path, place: Path, name: str, source: JsonObject) -> Path:
    """Move a finished folder to ``place``: hash the files, write the manifest, flush, rename."""
    listed = {
        path.relative_to(made).as_posix(): {"size": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(path for path in made.rglob("*") if path.is_file())
    }
    text = json.dumps({"format": 1, "name": name, "source": source, "files": listed}, indent=1)
    (made / MANIFEST).write_text(text, encoding="utf-8")
    files.install_folder(made, place)
    return place


def require_space(place: Path, needed: int) -> None:
    """Raise DiskFullError if fewer than ``needed`` bytes are free next to ``place``."""
    free = files.free_disk_bytes(place.parent)
    if free < needed:
        raise DiskFullError(
            f"{place.parent} has {free / 1e6:.0f} MB free; pulling {place.name} needs {needed / 1e6:.0f} MB.\n"
            "  Free some space, or set TUNESMITH_HOME."
        )
