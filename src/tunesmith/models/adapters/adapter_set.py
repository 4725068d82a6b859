"""Saved adapters under a folder, described from file headers; several adapters on one base in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from tunesmith.errors import ModelError, UserError
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record, saved_files
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.load import load, probe, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"
"""The name of the base alone, with every adapter off."""


class AdapterFacts(TypedDict):
    """A saved adapter. None = unknown; ``problem``: why the folder cannot be read."""

    path: str
    type: str | None
    r: int | None
    base: str | None
    parameters: int | None
    bytes: int | None
    run: str | None
    eval_loss: float | None
    problem: str | None


def find(folder: str | Path) -> list[AdapterFacts]:
    """Return the adapters in or under ``folder``, sorted by path. Raises UserError if it does not exist."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder called {folder}: name a folder with adapters in it, such as runs")
    return [_facts(file.parent) for file in sorted(root.resolve().rglob("adapter_config.json"))]


def _facts(path: Path) -> AdapterFacts:
    facts = cast(AdapterFacts, dict.fromkeys(AdapterFacts.__annotations__) | {"path": str(path)})
    try:
        config = headers.read_json(path / "adapter_config.json")
        files = headers.weight_files(path, "adapter_model")
        if not files:
            raise ModelError(f"{path} has no weights: expected adapter_model.safetensors. Copy it again.")
        base = record.read(path).get("base") or {}
        run = path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else None
        finished = run and (run / "manifest.json").is_file()
        manifest = headers.read_json(run / "manifest.json") if run and finished else {}
        tensors = headers.read_tensors(path, "adapter_model").values()
    except ModelError as error:  # the other folders are still listed
        return {**facts, "problem": str(error)}
    return {
        **facts,
        "type": adapter_types.type_of(config).lower(),
        "r": config.get("r"),
        "base": base.get("name") or config.get("base_model_name_or_path"),
        "parameters": sum(tensor.count for tensor in tensors),
        "bytes": sum(file.stat().st_size for file in files),
        "run": str(run) if run else None,
        "eval_loss": (manifest.get("result") or {}).get("eval_loss"),
    }


@dataclass
class Adapters:
    """One base with several adapters. ``model``: the peft model; ``active``: the adapter in use."""

    model: PreTrainedModel
    tokenizers: dict[str, PreTrainedTokenizerBase]
    active: str
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tokenizers[self.active]

    @property
    def names(self) -> list[str]:
        """The names that ``switch`` takes."""
        return [*self.folders, BASE]

    def switch(self, name: str) -> float:
        """Use the adapter ``name``, or ``base`` for none. Returns the seconds it took. Raises UserError."""
        if name not in self.names:
            raise UserError(f"no adapter called {name!r}: expected one of {', '.join(self.names)}")
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
    """Load the model ``base`` with every adapter of ``adapters`` (name -> folder); the first one is in use.

    ``base``: the base model of the adapters, or an adapter whose base is taken. Each adapter is checked as by
    ``load``: the fingerprint of its base, its tensors, and the logits written when it was saved. Raises
    ModelError, and UserError for adapters that cannot be loaded together.
    """
    located = locate(base)
    core = Folder(located.network, "full", None, None, located.remote_code)
    folders = {name: locate(folder) for name, folder in adapters.items()}
    if not folders:
        raise UserError("no adapter was named: expected at least one NAME=FOLDER")
    types = {name: _switchable_type(name, folder, core.path) for name, folder in folders.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in types.items())
        raise UserError(f"adapters loaded together must have the same type; {listed}. Load each one alone.")
    _check_layers(folders)
    several = Adapters(load.load_model(core), {BASE: load.load_tokenizer(core)}, BASE)
    for name, folder in folders.items():
        with saved_files.checking_weights(folder.path):
            several.model = load.attach_adapter(folder, several.model, False, name)
        several.folders[name] = folder.path
        several.tokenizers[name] = load.load_tokenizer(folder)
    several.model.eval()
    for name, folder in reversed(folders.items()):
        several.switch(name)
        probe.verify_probe(folder.path, several.model, several.tokenizer)
    return several


def _switchable_type(name: str, folder: Folder, base: Path) -> str:
    """Return the type of an adapter of ``base``. Raises UserError, ModelError if it must be loaded alone."""
    if folder.base is None:
        raise UserError(f"{name}: {folder.path} is a full model, not an adapter. Name adapter folders.")
    record.check_base(folder.path, base)
    if record.fingerprint(folder.base) != record.fingerprint(base):
        raise ModelError(f"{name}: {folder.path} has the base {folder.base}, not {base}. Name others.")
    config = headers.read_json(folder.path / "adapter_config.json")
    kind = adapter_types.type_of(config)
    why = None
    if not adapter_types.kind_of(kind).switchable:
        able = [name.lower() for name, known in adapter_types.KINDS.items() if known.switchable]
        why = f"is a {kind.lower()} adapter; only {', '.join(able)} adapters can be loaded with others"
    elif vocabulary.adapter_rows(folder.path):
        why = "adds tokens, so it changes the base's vocabulary"
    elif config.get("bias", "none") != "none":
        why = "trained the biases of the base, which the other adapters share"
    elif record.read(folder.path).get("quantization"):
        why = "was trained on a quantised base, which has other weights"
    if why:
        raise UserError(f"{name}: {folder.path} {why}.\n  Load it alone: tunesmith chat {folder.path}")
    return kind.lower()


def _check_layers(folders: Mapping[str, Folder]) -> None:
    """Raise UserError where one adapter trained a whole layer in which another has parameters."""
    tensors = {name: headers.read_tensors(folder.path, "adapter_model") for name, folder in folders.items()}
    layers = {name: adapter_types.layers_of(names) for name, names in tensors.items()}
    for name, folder in folders.items():
        saved = headers.read_json(folder.path / "adapter_config.json").get("modules_to_save") or []
        whole = [f".{module}." for module in saved]
        for other, names in layers.items():
            inside = [layer for layer in names if any(module in f".{layer}." for module in whole)]
            if other != name and inside:
                raise UserError(
                    f"{name} trained the whole layer {inside[0]} (modules_to_save), and {other} has parameters in "
                    "it: peft cannot load the two together.\n  Load them one by one with tunesmith.load."
                )
