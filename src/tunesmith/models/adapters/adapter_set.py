"""Adapters: which lie under a folder, told from headers alone; and several on one base in memory, to switch between."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError, UserError
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.load import load, probe, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base"
"""The name of the base alone, with every adapter off."""


def find(folder: str | Path) -> list[dict[str, Any]]:
    """The adapters under ``folder`` (itself one, perhaps), sorted by path; checkpoints of runs are none. No weight is read.

    Each is {"path", "type", "r", "base", "parameters", "bytes", "run", "eval_loss", "problem"}; what is not known is None, and
    of a folder that cannot be read ``problem`` says why. Raises UserError when there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder called {folder}: name a folder with adapters in it, such as runs")
    return [_facts(file.parent) for file in sorted(root.resolve().rglob("adapter_config.json"))]


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(path)}
    facts |= dict.fromkeys(("type", "r", "base", "parameters", "bytes", "run", "eval_loss", "problem"))
    try:
        return facts | _read(path)
    except ModelError as error:  # the others are still to be told of
        return facts | {"problem": str(error)}


def _read(path: Path) -> dict[str, Any]:
    config = headers.read_json(path / "adapter_config.json")
    files = headers.weight_files(path, "adapter_model")
    if not files:
        raise ModelError(f"{path} has no weights: expected adapter_model.safetensors. Copy the folder again.")
    base = record.read(path).get("base") or {}
    run = path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else None
    manifest = headers.read_json(run / "manifest.json") if run and (run / "manifest.json").is_file() else {}
    return {
        "type": str(config.get("peft_type", "")).lower(),
        "r": config.get("r"),
        "base": base.get("name") or config.get("base_model_name_or_path"),
        "parameters": sum(tensor.count for tensor in headers.read_tensors(path, "adapter_model").values()),
        "bytes": sum(file.stat().st_size for file in files),
        "run": str(run) if run else None,
        "eval_loss": (manifest.get("result") or {}).get("eval_loss"),
    }


@dataclass
class Adapters:
    """One base with several adapters beside each other. ``model``: the peft model; ``tokenizer``: that of the adapter in use."""

    model: PreTrainedModel
    tokenizers: dict[str, Any]
    active: str
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        return self.tokenizers[self.active]

    @property
    def names(self) -> list[str]:
        """What ``switch`` takes."""
        return [*self.folders, BASE]

    def switch(self, name: str) -> float:
        """Use the adapter ``name``, or ``base`` for none; no weight is loaded. Returns the seconds it took. Raises UserError."""
        if name not in self.names:
            raise UserError(f"no adapter called {name!r} here; there are {', '.join(self.names)}")
        begun = time.perf_counter()
        if name == BASE:
            self.model.base_model.disable_adapter_layers()
        else:
            if self.active == BASE:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name, inference_mode=True)
            self.model.requires_grad_(False)
        self.active = name
        return time.perf_counter() - begun


def load_adapters(base: str | Path, adapters: Mapping[str, str | Path]) -> Adapters:
    """The model ``base`` with every adapter of ``adapters`` (name -> folder) beside it; the first one is in use.

    ``base``: what the adapters stand on, or one of its adapters, of which the base is taken. Each adapter is loaded as strictly
    as ``load`` does: its base's fingerprint, its tensors, and the answers written when it was saved. Raises ModelError, and
    UserError where adapters cannot stand beside others.
    """
    stand = locate(base)
    core = Folder(stand.network, "full", None, None, stand.remote_code)
    found = {name: locate(folder) for name, folder in adapters.items()}
    if not found:
        raise UserError("no adapter was named: give at least one NAME=FOLDER")
    types = {name: _type(name, folder, core.path) for name, folder in found.items()}
    if len(set(types.values())) > 1:
        said = ", ".join(f"{name} is {kind}" for name, kind in types.items())
        raise UserError(
            f"adapters on one base must be of one kind, and {said}. Load them one by one with tunesmith.load."
        )
    _check_layers(found)
    model = load.load_model(core)
    made = Adapters(model, {BASE: load.load_tokenizer(core)}, BASE)
    for name, folder in found.items():
        made.model = load.attach_adapter(folder, made.model, False, name)
        made.folders[name] = folder.path
        made.tokenizers[name] = load.load_tokenizer(folder)
    made.model.eval()
    for name, folder in reversed(found.items()):
        made.switch(name)
        probe.verify_probe(folder.path, made.model, made.tokenizer)
    return made


def _type(name: str, folder: Folder, base: Path) -> str:
    """peft's type of an adapter that may stand beside others on ``base``. Raises UserError, and ModelError for another base."""
    if folder.base is None:
        raise UserError(
            f"{name}: {folder.path} is a full model (a merged one, perhaps), no adapter. Name adapter folders."
        )
    record.check_base(folder.path, base)
    if record.fingerprint(folder.base) != record.fingerprint(base):
        raise ModelError(
            f"{name}: {folder.path} stands on {folder.base}, not on {base}. Name adapters of one base."
        )
    config = headers.read_json(folder.path / "adapter_config.json")
    kind = str(config.get("peft_type", "")).lower()
    why = None
    if not adapter_types.kind_of(adapter_types.type_of(config)).switchable:
        able = ", ".join(name.lower() for name, known in adapter_types.KINDS.items() if known.switchable)
        why = f"is a {kind} adapter, and only {able} can stand beside others"
    elif vocabulary.adapter_rows(folder.path):
        why = "brings tokens of its own, so it changes the base's vocabulary"
    elif config.get("bias", "none") != "none":
        why = "trained the base's own biases, which the others would get too"
    elif record.read(folder.path).get("quantization"):
        why = "stands on a quantised base, which is another one"
    if why:
        raise UserError(
            f"{name}: {folder.path} {why}.\n  Load it alone: tunesmith.load, tunesmith chat {folder.path}"
        )
    return kind


def _check_layers(found: Mapping[str, Folder]) -> None:
    """Raise UserError where one adapter trained whole what another has its factors in: peft can have one of them there."""
    for name, folder in found.items():
        whole = headers.read_json(folder.path / "adapter_config.json").get("modules_to_save") or []
        ends = tuple(f".{module}." for module in whole)
        for other, beside in found.items():
            inside = [layer for layer in _layers(beside.path) if any(end in f".{layer}." for end in ends)]
            if other != name and inside:
                raise UserError(
                    f"{name} trained {inside[0]} whole (modules_to_save), and {other} has its own numbers in it, so they "
                    "cannot stand beside each other.\n  Load them one by one with tunesmith.load."
                )


def _layers(adapter: Path) -> list[str]:
    """The layers of the base that an adapter has factors, vectors or bottlenecks in."""
    names = headers.read_tensors(adapter, "adapter_model")
    inside = re.compile(rf"base_model\.model\.(.+?)\.(?:{'|'.join(adapter_types.PREFIXES)})")
    return [match[1] for name in names if (match := inside.match(name))]
