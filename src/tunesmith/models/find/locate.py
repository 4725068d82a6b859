"""Find the folder of a model by what the user calls it, and check it before a weight is read.

Nothing here uses the network, runs code that came with a model, or opens a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import catalog, config_bounds, headers, model_store, record, saved_files
from tunesmith.models.find.headers import TensorHeader

SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json")
"""The files that may ask for code to be run."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A model on disk. ``base``: the full model under an adapter. ``run``: the run that wrote the model.

    ``remote_code``: whether Python files that came with the model may run (the recipe's
    ``trust_remote_code``). ``checkpoint``: its weights replace those of the run's saved model.
    """

    path: Path
    kind: Literal["full", "adapter"]
    base: Path | None = None
    run: Path | None = None
    remote_code: bool = False
    checkpoint: Path | None = None

    @property
    def network(self) -> Path:
        """The folder with the whole network: an adapter's base model, else the folder itself."""
        return self.base or self.path


def locate(model: str | Path, remote_code: bool = False, checkpoints: bool = False) -> Folder:
    """Find and check a model: a catalog name, a model folder, an adapter folder or a run folder.

    ``checkpoints``: accept a checkpoint of a run, whose weights the caller must put into the run's model.
    ``remote_code``: accept a model that brings Python code. Raises ModelError for an unknown name, a model
    not pulled, missing or pickled weights, invalid JSON or safetensors headers, a model with code, and a file
    that changed since it was saved (weights are hashed when they are loaded).
    """
    name = str(model)
    stored = model_store.folder_of(name)
    if name in catalog.CATALOG or ("/" in name and not Path(name).exists() and stored.is_dir()):
        advice = f"\n  Type: tunesmith models pull {name}"
        if not stored.is_dir():
            raise ModelError(f"the model {name!r} is not on this machine yet.{advice}")
        if problems := model_store.problems(stored):
            raise ModelError(f"the model {name!r} in {stored} is damaged: {'; '.join(problems)}.{advice}")
        return _check_folder(stored, None, remote_code)
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"no model or folder is called {name!r}. {catalog.suggest(name)}")
    if not path.is_dir():
        raise ModelError(f"{path} is a file; expected a model folder with config.json, or a run folder")
    path = path.resolve()
    if path.parent.name == "checkpoints" and (path.parent.parent / "recipe.yaml").is_file():
        return _of_checkpoint(path, remote_code, checkpoints)
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        if (path / "model").is_dir():
            return _check_folder(path / "model", path, remote_code)
        if (path / "recipe.yaml").is_file():
            raise ModelError(
                f"the run {path} has saved no model yet. Let it end, or continue it with --resume."
            )
    in_run = path.name == "model" and (path.parent / "recipe.yaml").is_file()
    return _check_folder(path, path.parent if in_run else None, remote_code)


def _of_checkpoint(path: Path, remote_code: bool, checkpoints: bool) -> Folder:
    """Return the saved model of a checkpoint's run, with the checkpoint if their steps differ.

    Raises ModelError if a checkpoint of another step is not accepted."""
    run = path.parent.parent
    if not (run / "model").is_dir():
        raise ModelError(f"the run {run} has saved no model yet. Let it end, or continue it with --resume.")
    result = headers.read_json_if_present(run / "manifest.json").get("result") or {}
    saved_step = result.get("best_step") or result.get("steps")
    folder = _check_folder(run / "model", run, remote_code)
    if path.name == f"step-{saved_step}":
        return folder
    if not checkpoints:
        of_step = f", of step {saved_step}" if saved_step else ""
        raise ModelError(
            f"{path} is a checkpoint, from which its run continues; generate, chat, evaluate, predict and score open it.\n"
            f"  Here name the run's model{of_step}: {run}"
        )
    return replace(folder, checkpoint=path)


def _check_folder(path: Path, run: Path | None, remote_code: bool) -> Folder:
    path = path.resolve()
    saved_files.check_settings(path)
    if (path / "adapter_config.json").is_file():
        config = headers.read_json(path / "adapter_config.json")
        _refuse_code(config, path / "adapter_config.json", remote_code)
        config_bounds.check_counts(
            config, _check_weights(path, "adapter_model"), path / "adapter_config.json"
        )
        base = _find_base(path, config).resolve()
        saved_files.check_settings(base)
        _check_full_model(base, remote_code)
        return Folder(path, "adapter", base, run, remote_code)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: expected a model, adapter or run folder")
    _check_full_model(path, remote_code)
    return Folder(path, "full", None, run, remote_code)


def _check_full_model(path: Path, remote_code: bool) -> None:
    check_settings(path, remote_code)
    tensors = _check_weights(path, "model")
    for name in SETTINGS:
        config_bounds.check_counts(headers.read_json_if_present(path / name), tensors, path / name)


def check_settings(path: Path, remote_code: bool = False) -> None:
    """Raise ModelError when a JSON file of a model folder is invalid or asks for code to be run."""
    for name in SETTINGS:
        _refuse_code(headers.read_json_if_present(path / name), path / name, remote_code)


def code_files(folder: Folder) -> list[Path]:
    """Return the Python files that ``auto_map`` names, and those next to them, which they may import.

    Raises ModelError for a file that is not in the folder.
    """
    files: dict[Path, None] = {}
    for place, name in ((place, name) for place in (folder.network, folder.path) for name in SETTINGS):
        for reference in _code_references(headers.read_json_if_present(place / name)):
            file = place / f"{reference.rpartition('.')[0].replace('.', '/')}.py"
            if "--" in reference or not file.is_file():
                raise ModelError(
                    f"{place / name} asks for the code {reference!r}, which is not in that folder.\n"
                    "  Copy the model with its .py files, and with `auto_map` naming them."
                )
            files |= dict.fromkeys([file, *sorted(file.parent.rglob("*.py"))])
    return list(files)


def _entries(config: object, prefix: str = "") -> Iterator[tuple[str, str, object]]:
    """Yield (dotted path, key, value) of every entry of nested mappings and lists, outer entries first."""
    for item in config if isinstance(config, list) else ():
        yield from _entries(item, prefix)
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}", key, value
        yield from _entries(value, f"{prefix}{key}.")


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _code_references(config: JsonObject) -> Iterator[str]:
    """Yield ``module.Class`` of every ``auto_map``."""
    for _, key, value in _entries(config):
        for one in _values(value) if key == "auto_map" else ():
            yield from (str(part) for part in (one if isinstance(one, list) else [one]) if part)


def _check_weights(path: Path, stem: str) -> list[TensorHeader]:
    """Return the tensors of every weight file. Raises ModelError when there is no safetensors file."""
    if files := headers.weight_files(path, stem):
        return [tensor for file in files for tensor in headers.read_header(file).values()]
    if pickles := headers.pickle_files(path):
        raise ModelError(
            f"{path} has its weights as {', '.join(file.name for file in pickles)}. Opening a pickle "
            f"runs code that came with it, so tunesmith does not.\n  Type: tunesmith models convert {path}"
        )
    raise ModelError(f"{path} has no weights: expected {stem}.safetensors, or its index with shards")


def _refuse_code(config: JsonObject, file: Path, remote_code: bool) -> None:
    """Raise ModelError when settings make a library import code from the folder or download a kernel."""
    for path, key, value in _entries(config):
        if key == "auto_map" and value and not remote_code:
            raise ModelError(
                f"{file}: `{path}` asks to run code that came with the model, and tunesmith does not.\n"
                "  Use another model; or read the code, and train with trust_remote_code=true."
            )
        kernel = "attn_implementation" in key or "experts_implementation" in key
        if kernel and any("/" in str(name) for name in _values(value)):
            raise ModelError(f"{file}: `{path}` names a kernel of the Hub, {value!r}. Remove the key.")


def _find_base(adapter: Path, config: JsonObject) -> Path:
    """Return the folder of an adapter's base model: by path, else by name in the store."""
    recorded = record.read(adapter).get("base") or {}
    named = config.get("base_model_name_or_path") or ""
    catalog_name = catalog.name_of_repo(named)
    relative = [adapter / place for place in (recorded.get("relative"), named) if place]
    for place in (named, recorded.get("path"), *relative):
        if place and (Path(place) / "config.json").is_file():
            return Path(place)
    for name in (recorded.get("name"), catalog_name, named):
        if name and model_store.folder_of(name).is_dir():
            return model_store.folder_of(name)
    known = recorded.get("name") or catalog_name
    copy = "Copy it there, or change base_model_name_or_path in adapter_config.json."
    advice = f"Type: tunesmith models pull {known}" if known else copy
    name = known or named or "an unnamed model"
    raise ModelError(f"{adapter} is an adapter of {name!r}, which is not on this machine.\n  {advice}")
