"""A new folder that appears whole or not at all: filled under a temporary name beside its place, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import UserError


def place(out: str | Path, verb: str) -> Path:
    """Where ``out`` will be. Raises UserError when something is there; ``verb`` is who asks."""
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise UserError(f"{target} exists already; {verb} writes a new folder. Choose another --out, or remove it.")
    return target


def make(folder: Path) -> None:
    """Make a folder and those above it, where they are not there. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}. Name another place with --out.") from None


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """An empty folder that becomes ``target`` when the block ends, and is gone when it fails."""
    make(target.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's own is the user's alone
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
