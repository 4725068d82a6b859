"""Pickled weights to safetensors, as a program: the only file of tunesmith that opens a pickle.

``models.find.convert`` runs ``python -P -m tunesmith.models.find.unpickle JOB.json``.
``torch.load(weights_only=True)`` builds tensors and plain containers. Any other name in the pickle ends this
process with an error before anything is imported. Each line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""The pickled magic number that begins a torch.save file without zip (the default until PyTorch 1.5)."""


def convert(pickles: list[Path], targets: list[Path], tied: dict[str, list[str]]) -> dict[str, list[str]]:
    """Write each pickle's tensors into the file of ``targets``. Returns file name -> tensor names.

    ``tied``: name -> names under which the model keeps the same tensor. It is left out where an equal tensor
    exists under another name, and renamed where none exists. Other tensors keep name, dtype and values.
    """
    loaded = []
    for path in pickles:
        _report(f"reading {path.name}, {path.stat().st_size / 1e6:,.0f} MB")
        loaded.append(_read_tensors(path))
    everything = {name: tensor for tensors in loaded for name, tensor in tensors.items()}
    left_out, renamed = set(), {}
    for name, names in tied.items():
        present = [other for other in names if other in everything]
        if name in everything and not present:
            renamed[name] = names[0]
        elif name in everything and _equal(everything[name], everything[present[0]]):
            left_out.add(name)
    written = {}
    for tensors, target in zip(loaded, targets, strict=True):
        names = [name for name in tensors if name not in left_out]
        kept = {renamed.get(name, name): tensors[name].contiguous() for name in names}
        if kept:
            _report(f"writing {target.name}, {len(kept)} tensors")
            save_file(_without_shared_memory(kept), target, metadata={"format": "pt"})
            written[target.name] = sorted(kept)
    return written


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return name -> tensor. Trainers write the mapping under ``state_dict``."""
    if reason := _not_a_checkpoint(path):
        raise SystemExit(f"{path.name} is no PyTorch checkpoint: {reason}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(_is_tensor(*item) for item in content.items()):
        raise SystemExit(f"{path.name} does not hold weights: expected a mapping of names to tensors")
    return dict(content)


def _not_a_checkpoint(path: Path) -> str:
    """Return why torch.save cannot have written the file, "" where it may have. Nothing is unpickled."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            has_data = any(name.endswith("data.pkl") for name in archive.namelist())
        return "" if has_data else "a zip archive without a data.pkl"
    with path.open("rb") as file:
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            return ""
        file.seek(0)
        code = _first_global(file)
    if code:
        return f"a plain pickle that asks for {code} when it is opened"
    return "neither a whole zip archive nor torch's older format"


def _first_global(file: IO[bytes]) -> str:
    """Return the first name of code that a pickle's instructions ask for, "" for none or for no pickle."""
    texts: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            texts += [argument] if isinstance(argument, str) else []
    except ValueError:
        pass  # not a pickle, or a truncated one
    return ""


def _is_tensor(name: object, value: object) -> bool:
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    return isinstance(name, str) and dense


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _without_shared_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Clone tensors that share memory with an earlier one: safetensors refuses them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen and address else tensor
        seen.add(address)
    return separate


def _report(line: str) -> None:
    print(json.dumps({"progress": line}), flush=True)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    paths = {key: [Path(name) for name in job[key]] for key in ("pickles", "targets")}
    result = convert(**paths, tied=job["tied"])
    print(json.dumps({"written": result}), flush=True)
