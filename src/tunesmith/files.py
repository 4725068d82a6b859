"""The home folder, files and folders that appear whole or not at all, and their hashes: nothing else here
knows them.

Everything is written under a hidden name in the folder of its target, synced to the disk, and then renamed.
So a kill or a power cut at any moment leaves the old one or the new one, and what is left of an unfinished
one (``.NAME.*.tmp``) is never mistaken for either.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import DiskFullError, UserError

MARGIN_BYTES = 64 * 2**20
"""Bytes that must stay free in addition to those of a folder to be published."""

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Error numbers of a disk, a quota or a file-size limit that is used up."""


def home() -> Path:
    """Where tunesmith keeps what it downloads and prepares: $TUNESMITH_HOME (``~`` is expanded), else
    ~/.cache/tunesmith.
    """
    return Path(os.environ.get("TUNESMITH_HOME") or "~/.cache/tunesmith").expanduser()


def free_disk_bytes(path: str | Path) -> int:
    """Bytes this user can still write where ``path`` lies. ``path`` need not exist yet: its nearest existing
    parent counts.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, onto the disk."""
    if os.name != "posix" and path.is_dir():  # elsewhere a folder cannot be opened to be synced
        return
    handle = os.open(
        path, os.O_RDONLY if os.name == "posix" else os.O_RDWR
    )  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raise DiskFullError naming ``path`` when the disk fills up in this block."""
    try:
        yield
    except Exception as error:
        if _error_number(error) not in FULL:
            raise
        raise DiskFullError(
            f"no room left to write {path}: {os.strerror(_error_number(error))}. Everything saved before is kept.\n"
            "  Free some space, then type the same command again; add --resume to continue a training run."
        ) from None


def _error_number(error: Exception) -> int:
    """The system's number of an error; safetensors, which is Rust, has it only in its message. 0 = none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


# ------------------------------------------------------------------------------------------- files


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; the file there replaces ``target`` when the block ends, and is removed when
    the block fails.

    Raises DiskFullError.
    """
    temporary = _temporary(target)
    try:
        with naming_full_disk(target):
            yield temporary
            sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(target: Path, content: bytes) -> None:
    """Put ``content`` in the place of ``target``. Raises DiskFullError."""
    with publish_file(target) as temporary:
        temporary.write_bytes(content)


# ------------------------------------------------------------------------------------------- folders


def new_target(out: str | Path, verb: str) -> Path:
    """The absolute path of ``out``, which the command ``verb`` will make.

    Raises UserError when something is there.
    """
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise UserError(
            f"{target} exists already; {verb} writes a new folder. Choose another --out, or remove it."
        )
    return target


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made: {error.strerror}. Name another place with --out."
        ) from None


def temporary_folder(target: Path, mode: int = 0o777) -> Path:
    """Make an empty hidden folder next to ``target``, to be filled and renamed to it.

    No two calls make the same one.
    """
    folder = _temporary(target)
    folder.mkdir(mode)
    return folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` when the block ends, and is removed when the block fails.

    Raises UserError where it cannot be made, DiskFullError when the disk fills up.
    """
    make_folder(target.parent)
    made = temporary_folder(target)
    try:
        with naming_full_disk(target):
            yield made
            install_folder(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish_folder(target: Path, write: Callable[[Path], None], needed_bytes: int) -> None:
    """Make ``target``: ``write`` fills the folder it is given. An old ``target`` is replaced.

    Raises DiskFullError, leaving the old one, when the disk fills up or ``needed_bytes`` and ``MARGIN_BYTES``
    are not free.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free = free_disk_bytes(target.parent)
    if free < needed_bytes + MARGIN_BYTES:
        raise DiskFullError(
            f"{target} needs {needed_bytes / 2**20:.0f} MB and {free / 2**20:.0f} MB are free on its disk. "
            "The last checkpoint is kept.\n"
            "  Free some space, then type the same command with --resume."
        )
    with new_folder(target) as made:
        write(made)


def install_folder(made: Path, target: Path) -> None:
    """Sync the filled folder ``made``, which lies on the same disk, and rename it to ``target``.

    An old one is replaced.
    """
    for path in (*sorted(made.rglob("*")), made):
        sync(path)
    replaced = _replaced(target)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    made.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(target: Path) -> None:
    """Finish what a kill between the two renames of ``install_folder`` left, and remove temporary files and
    folders.
    """
    replaced = _replaced(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for leftover in target.parent.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which is renamed first: nobody takes a half-removed one for a whole one."""
    hidden = _temporary(folder)
    with suppress(FileNotFoundError):  # another process removed it
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_abandoned(folder: Path, pattern: str, seconds: float) -> None:
    """Remove the folders in ``folder`` that match ``pattern`` and in which nothing was written for
    ``seconds``.
    """
    for old in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process finished or removed it
            if max(path.lstat().st_mtime for path in (old, *old.rglob("*"))) < time.time() - seconds:
                shutil.rmtree(old, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
