"""Checkpoints: everything a run needs to go on bit for bit, written so that a kill or a full disk never costs the last good one.

A checkpoint is a folder ``step-N``: ``state.safetensors`` (masters, optimiser moments, random state), ``state.json`` (counters,
schedule, sums of the open logging window) and ``manifest.json`` (size and sha256 of both), made in a temporary folder, synced,
then renamed. A folder without a manifest that verifies is no checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunesmith import files


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write ``folder/step-N``. Raises DiskFullError, leaving every earlier checkpoint and no rubbish."""
    target = folder / f"step-{step}"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def write(temporary: Path) -> None:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary / "state.safetensors",
        )
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        listed = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": files.sha256(temporary / name)}
            for name in FILES
        }
        (temporary / "manifest.json").write_text(
            json.dumps({"step": step, "files": listed}), encoding="utf-8"
        )

    files.publish_folder(target, write, needed)
    return target


FILES = ("state.safetensors", "state.json")


def newest(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint that verifies; None when there is none. Each one passed over is said."""
    for step in sorted(steps(folder), reverse=True):
        path = folder / f"step-{step}"
        problem = damage(path)
        if problem is None:
            return load_file(path / "state.safetensors"), json.loads(
                (path / "state.json").read_text(encoding="utf-8")
            )
        say(f"the checkpoint {path} is damaged ({problem}); the one before it is used")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        listed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name in FILES:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != listed[name]["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {listed[name]['bytes']}"
            if files.sha256(file) != listed[name]["sha256"]:
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
        files.remove_folder(folder / f"step-{step}")
