"""The answers of the iteration that is sampled and scored now, in one file next to the checkpoints.

A checkpoint holds an iteration from its first update on. This file holds it before: a run that is killed while
it scores or measures its answers samples nothing twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import files
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    import torch

NAME = "iteration.safetensors"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], state: JsonObject) -> None:
    """Replace the file atomically. Raises DiskFullError."""
    from safetensors.torch import save as as_bytes

    files.make_folder(folder)
    content = as_bytes(dict(tensors), {"state": json.dumps(state, default=str)})
    files.replace_file(folder / NAME, hashlib.sha256(content).digest() + content)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], JsonObject] | None:
    """Return what :func:`save` wrote; None for a missing or damaged file, whose answers are sampled again."""
    from safetensors.torch import load as from_bytes

    path = folder / NAME
    saved = path.read_bytes() if path.is_file() else b""
    digest, content = saved[:32], saved[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    state: JsonObject = json.loads(header["__metadata__"]["state"])
    return from_bytes(content), state
