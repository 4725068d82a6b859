"""Pickled weights to safetensors, in a process of its own: the only file of tunesmith that opens a pickle.

``models.find.convert`` runs ``python -P -m tunesmith.models.find.unpickle JOB.json``.
``torch.load(weights_only=True)`` builds tensors and plain containers
and nothing else: any other name in the pickle ends this process with an error, before it is imported. What is
read is written and dropped; nothing of it reaches the process of the user. Each line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file

OLDER = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""How a file of torch.save begins that is no zip archive (until PyTorch 1.5, or by choice): its magic number, pickled."""


def convert(pickles: list[Path], targets: list[Path], tied: dict[str, list[str]]) -> dict[str, list[str]]:
    """Write the tensors of each pickle into the safetensors file beside it in ``targets``; file name -> tensor names.

    ``tied``: name -> names under which the model keeps the same tensor. It is left out where another is there and equal, and
    renamed where none is. Every other tensor keeps its name, its dtype and its values; those that share memory are written apart.
    """
    loaded = []
    for path in pickles:
        _say(f"reading {path.name}, {path.stat().st_size / 1e6:,.0f} MB")
        loaded.append(_tensors(path))
    everything = {name: tensor for tensors in loaded for name, tensor in tensors.items()}
    left_out, renamed = set(), {}
    for name, others in tied.items():
        there = [other for other in others if other in everything]
        if name in everything and not there:
            renamed[name] = others[0]
        elif name in everything and _same(everything[name], everything[there[0]]):
            left_out.add(name)
    written = {}
    for tensors, target in zip(loaded, targets, strict=True):
        own = {
            renamed.get(name, name): tensor.contiguous()
            for name, tensor in tensors.items()
            if name not in left_out
        }
        if not own:
            continue
        _say(f"writing {target.name}, {len(own)} tensors")
        save_file(_apart(own), target, metadata={"format": "pt"})
        written[target.name] = sorted(own)
    return written


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of one file. The mapping may lie under ``state_dict``, as trainers write it."""
    if why := _no_checkpoint(path):
        raise SystemExit(f"{path.name} is no PyTorch checkpoint: {why}")
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if (
        not isinstance(found, dict)
        or not found
        or not all(_is_tensor(name, value) for name, value in found.items())
    ):
        raise SystemExit(f"{path.name} does not hold weights: expected a mapping of names to tensors")
    return dict(found)


def _no_checkpoint(path: Path) -> str:
    """Why torch.save did not write the file; "" where it may have. Nothing is unpickled."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return (
                ""
                if any(name.endswith("data.pkl") for name in archive.namelist())
                else "a zip archive without a data.pkl"
            )
    with path.open("rb") as file:
        if file.read(len(OLDER)) == OLDER:
            return ""
        file.seek(0)
        asked = _asked(file)
    return (
        f"a plain pickle that asks for {asked} when it is opened"
        if asked
        else "neither a whole zip archive nor torch's older format"
    )


def _asked(file: IO[bytes]) -> str:
    """The first name of code that a pickle asks for, read off its instructions; "" for none, or no pickle."""
    texts: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            texts += [argument] if isinstance(argument, str) else []
    except ValueError:
        pass  # no pickle, or none any more
    return ""


def _is_tensor(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, no two in the same memory: safetensors holds each tensor once."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen and place else tensor
        seen.add(place)
    return out


def _say(line: str) -> None:
    print(json.dumps({"said": line}), flush=True)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    done = convert(
        [Path(name) for name in job["pickles"]], [Path(name) for name in job["targets"]], job["tied"]
    )
    print(json.dumps({"written": done}), flush=True)
