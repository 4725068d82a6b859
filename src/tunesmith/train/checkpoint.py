"""Checkpoints: everything a run needs to go on bit for bit, written so that a kill or a full disk never costs the last good one.

A checkpoint is a folder ``step-N``: ``state.safetensors`` (masters, optimiser moments, random state), ``state.json`` (counters,
schedule, sums of the open logging window) and ``manifest.json`` (size and sha256 of both), made in a temporary folder, synced,
then renamed. A folder without a manifest that verifies is no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunesmith.errors import DiskFullError
from tunesmith.train import machine

MARGIN = 64 * 2**20  # bytes that must stay free beside what is written


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write ``folder/step-N``. Raises DiskFullError, leaving every earlier checkpoint and no rubbish."""
    target = folder / f"step-{step}"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def write(temporary: Path) -> None:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in FILES}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")

    publish(target, write, needed)
    return target


FILES = ("state.safetensors", "state.json")


def publish(target: Path, write: Callable[[Path], None], needed: int) -> None:
    """Make ``target`` as a whole: ``write`` fills a temporary folder, which is synced and renamed. An old ``target`` is replaced.

    ``needed`` bytes must be free (DiskFullError otherwise).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free = machine.free_disk_bytes(target.parent)
    if free < needed + MARGIN:
        raise DiskFullError(
            f"{target} needs {needed / 2**20:.0f} MB and {free / 2**20:.0f} MB are free on its disk. "
            "The last checkpoint is kept.\n"
            "  Free some space, then type the same command with --resume."
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for path in (*sorted(temporary.rglob("*")), temporary):
            _sync(path)
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"writing {target} failed: {error.strerror}. The last checkpoint is kept.\n"
                "  Free some space, then type the same command with --resume."
            ) from None
        raise


def recover(target: Path) -> None:
    """Finish what a kill between the two renames of ``publish`` left, and remove temporary folders."""
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for leftover in target.parent.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def newest(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint that verifies; None when there is none. Each one passed over is said."""
    for step in sorted(steps(folder), reverse=True):
        path = folder / f"step-{step}"
        problem = damage(path)
        if problem is None:
            return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
        say(f"the checkpoint {path} is damaged ({problem}); the one before it is used")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name in FILES:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != files[name]["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {files[name]['bytes']}"
            if _sha256(file) != files[name]["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json cannot be read"
    return None


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, in order."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(match.group(1)) for match in found if match)


def rotate(folder: Path, limit: int, pinned: set[int]) -> None:
    """Remove the oldest checkpoints beyond ``limit``; the newest and the ``pinned`` steps always stay."""
    removable = [step for step in steps(folder)[:-1] if step not in pinned]
    for step in removable[: max(0, len(removable) + 1 - limit)]:
        doomed = folder / f".step-{step}.tmp"
        (folder / f"step-{step}").rename(doomed)  # renamed first: a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # elsewhere a folder cannot be opened to be synced
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
