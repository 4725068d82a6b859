"""The home folder, atomic writes of files and folders, and file hashes. No other module implements these.

Everything is written under a hidden name next to its target, synced to the disk, and then renamed. A kill or
a power cut at any moment leaves either the old version or the new one. Leftovers of an unfinished write
(``.NAME.*.tmp``) are never read.
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

from tunesmith.errors import DiskError, DiskFullError, UserError

MARGIN_BYTES = 64 * 2**20
"""``publish_folder`` keeps this many bytes free in addition to the size of the folder."""

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Error numbers of a full disk, an exhausted quota and a file-size limit (whose signal Python ignores)."""

BROKEN = frozenset((errno.EROFS, errno.EIO))
"""Error numbers of a read-only disk (a system makes a disk read-only after an error) and of a broken disk."""


def home() -> Path:
    """Return the folder of downloads and caches: $TUNESMITH_HOME (may begin with ``~``) or ~/.cache/tunesmith."""
    return Path(os.environ.get("TUNESMITH_HOME") or "~/.cache/tunesmith").expanduser()


def free_disk_bytes(path: str | Path) -> int:
    """Return how many bytes this user can still write on the disk of ``path``, which need not exist yet."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, onto the disk."""
    is_posix = os.name == "posix"
    if not is_posix and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)  # Windows syncs writable handles only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming_full_disk(path: Path | str) -> Iterator[None]:
    """Raise DiskFullError with ``path`` when the disk fills up in this block, DiskError when it breaks."""
    try:
        yield
    except Exception as error:
        named = disk_error(error, path)
        if named is None:
            raise
        raise named from None


def disk_error(error: Exception, path: Path | str) -> DiskError | None:
    """Return the error that names ``path`` if ``error`` is that of a full or broken disk, else None."""
    number = _error_number(error)
    if number in BROKEN:
        return DiskError(
            f"{path} cannot be written: {os.strerror(number)}. Everything saved before is kept.\n"
            "  Look at the disk, then type the same command again; add --resume to continue a training run."
        )
    if number not in FULL:
        return None
    return DiskFullError(
        f"no room left to write {path}: {os.strerror(number)}. Everything saved before is kept.\n"
        "  Free some space, then type the same command again; add --resume to continue a training run."
    )


def _error_number(error: Exception) -> int:
    """Return the system's error number, 0 if there is none. safetensors (Rust) and the error of another process
    have it only in their message."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(match[1] or match[2]) if match else 0


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces ``target`` at the end, unless the block fails.

    Raises DiskFullError.
    """
    temporary = _temporary_path(target)
    try:
        with naming_full_disk(target):
            yield temporary
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)


def replace_file(target: Path, content: bytes) -> None:
    """Write ``content`` to ``target`` atomically. Raises DiskFullError."""
    with publish_file(target) as temporary:
        temporary.write_bytes(content)


def new_target(out: str | Path, verb: str) -> Path:
    """Return the absolute path of the folder that ``verb`` will make. Raises UserError if it exists."""
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise UserError(
            f"{target} exists already; {verb} writes a new folder. Choose another --out, or remove it."
        )
    return target


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents. Raises UserError if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made: {error.strerror}. Name another folder with --out."
        ) from None


def temporary_folder(target: Path, mode: int = 0o777) -> Path:
    """Make a new hidden folder next to ``target``, to be filled and renamed to it."""
    folder = _temporary_path(target)
    folder.mkdir(mode)
    return folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` at the end, and is removed if the block fails.

    Raises UserError if the folder cannot be made, DiskFullError when the disk fills up.
    """
    make_folder(target.parent)
    with naming_full_disk(target):
        folder = temporary_folder(target)
    try:
        with naming_full_disk(target):
            yield folder
            install_folder(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(target: Path, write: Callable[[Path], None], needed_bytes: int) -> None:
    """Make or replace ``target``; ``write`` fills the folder that it gets.

    Raises DiskFullError when the disk fills up, or has less than ``needed_bytes`` + ``MARGIN_BYTES`` free.
    The old folder then stays.
    """
    with naming_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    free = free_disk_bytes(target.parent)
    if free < needed_bytes + MARGIN_BYTES:
        raise DiskFullError(
            f"{target} needs {needed_bytes / 2**20:.0f} MB and {free / 2**20:.0f} MB are free on its disk. "
            "The last checkpoint is kept.\n"
            "  Free some space, then type the same command with --resume."
        )
    with new_folder(target) as folder:
        write(folder)


def install_folder(folder: Path, target: Path) -> None:
    """Sync ``folder`` and rename it to ``target`` on the same disk, replacing an old one."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)
    replaced = _replaced_path(target)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(target: Path) -> None:
    """Restore ``target`` after a kill inside ``install_folder``; remove temporary files."""
    replaced = _replaced_path(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for leftover in target.parent.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Rename a folder and then remove it, so that no reader finds it half removed."""
    hidden = _temporary_path(folder)
    with suppress(FileNotFoundError), naming_full_disk(folder):  # another process removed it
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_abandoned(folder: Path, pattern: str, seconds: float) -> None:
    """Remove the folders in ``folder`` that match ``pattern`` and were not written to for ``seconds``."""
    for old in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process finished or removed it
            if max(path.lstat().st_mtime for path in (old, *old.rglob("*"))) < time.time() - seconds:
                shutil.rmtree(old, ignore_errors=True)


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
