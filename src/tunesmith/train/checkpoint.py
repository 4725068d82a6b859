"""Checkpoints: everything a run needs to continue bit for bit.

A checkpoint is a folder ``step-N`` with ``state.safetensors`` (masters, optimiser moments, random state),
``state.json`` (counters, schedule, sums of the open logging window) and ``manifest.json`` (size and sha256 of
both). It is written to a temporary folder, synced and renamed, so a kill or a full disk never destroys the
last good one. A folder whose manifest does not verify is not a checkpoint.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tunesmith import files
from tunesmith.json_types import JsonObject

FILES = ("state.safetensors", "state.json")


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: JsonObject) -> Path:
    """Write ``folder/step-N``. Raises DiskFullError, and leaves no partial folder."""
    target = folder / f"step-{step}"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def write(temporary: Path) -> None:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        listed = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": files.sha256(temporary / name)}
            for name in FILES
        }
        manifest = json.dumps({"step": step, "files": listed})
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")

    files.publish_folder(target, write, needed)
    return target


def newest(folder: Path) -> tuple[int | None, dict[int, str]]:
    """Return the step of the newest intact checkpoint, or None, and the damage of each newer one by step."""
    damaged: dict[int, str] = {}
    for step in reversed(steps(folder)):
        damage = find_damage(folder / f"step-{step}")
        if damage is None:
            return step, damaged
        damaged[step] = damage
    return None, damaged


def load_state(folder: Path, step: int) -> JsonObject:
    """Return the state of ``folder/step-N`` without its tensors."""
    state: JsonObject = json.loads((folder / f"step-{step}" / "state.json").read_text(encoding="utf-8"))
    return state


def load(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], JsonObject]:
    """Return tensors and state of ``folder/step-N``, which ``newest`` has verified already."""
    return load_file(folder / f"step-{step}" / "state.safetensors"), load_state(folder, step)


def find_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint folder, or return None."""
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
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "manifest.json cannot be read"
    return None


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, in order."""
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(match.group(1)) for match in matches if match)


def rotate(folder: Path, limit: int, pinned: set[int]) -> None:
    """Remove the oldest checkpoints beyond ``limit``; keep the newest and the ``pinned`` steps always."""
    removable = [step for step in steps(folder)[:-1] if step not in pinned]
    for step in removable[: max(0, len(removable) + 1 - limit)]:
        files.remove_folder(folder / f"step-{step}")
