"""What every local store shares: one folder for each thing that was pulled, put in place whole or not at all.

A thing is made in a temporary folder beside its place. Its manifest, with the size and sha256 of every file, is written
last; then everything is flushed to disk and the folder renamed. So an entry without a manifest, or with a file that differs
from it, was interrupted or damaged, and pulling again mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.errors import DiskFullError, UserError

MANIFEST = "manifest.json"
_FORGOTTEN = 30 * 24 * 3600.0
"""Seconds after which nobody will go on with a download."""


class Damaged(UserError):
    """What arrived is not what was promised."""


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
        elif deep and files.sha256(path) != expected["sha256"]:
            found.append(f"{name} has another sha256")
    return found


def git_sha1(path: Path) -> str:
    """The name that git, and so the Hub, gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check(path: Path, expected: str, what: str) -> None:
    """Raise Damaged unless the file ``path`` of ``what`` has the sha256 ``expected``."""
    if not path.is_file():
        raise Damaged(f"{what} does not hold {path.name}")
    found = files.sha256(path)
    if found != expected:
        raise Damaged(
            f"{what}: {path.name} has sha256 {found}, expected {expected}. It was damaged or changed; pull again."
        )


def partial(place: Path, revision: str, size: int) -> Path:
    """The folder beside ``place`` that a download of ``size`` bytes fills: it outlives an interruption, and is gone on with.

    Downloads of another revision, and those nobody went on with for a month, are removed. Raises DiskFullError.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = place.parent / f".part-{place.name}-{revision[:12]}"
    files.remove_abandoned(place.parent, ".part-*", _FORGOTTEN)
    for old in place.parent.glob(".part-*"):
        if old.name.rpartition("-")[0] == folder.name.rpartition("-")[0] and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    missing = size - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_space(place, missing)
    return folder


def install(made: Path, place: Path, name: str, source: dict[str, Any]) -> Path:
    """Move a finished folder into ``place``: hash, manifest, flush, rename. A damaged entry is replaced."""
    listed = {}
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        listed[path.relative_to(made).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": files.sha256(path),
        }
    text = json.dumps({"format": 1, "name": name, "source": source, "files": listed}, indent=1)
    (made / MANIFEST).write_text(text, encoding="utf-8")
    files.install_folder(made, place)
    return place


def require_space(place: Path, needed: int) -> None:
    """Raise DiskFullError when fewer than ``needed`` bytes are free beside ``place``."""
    free = files.free_disk_bytes(place.parent)
    if free < needed:
        raise DiskFullError(
            f"{place.parent} has {free / 1e6:.0f} MB free; pulling {place.name} needs {needed / 1e6:.0f} MB.\n"
            "  Free some space, or set TUNESMITH_HOME."
        )
