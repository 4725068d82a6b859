"""From what a user calls a model to a folder on disk, checked before a weight is read.

Nothing here reaches the network, runs code that came with a model, or opens a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import ModelError
from tunesmith.models.find import catalog, headers, model_store, record

SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Folder:
    """A model on disk. ``base`` is the full model under an adapter; ``run`` the run folder that it came from.

    ``remote_code``: whether Python files that came with the model may be run (the recipe's ``trust_remote_code``).
    """

    path: Path
    kind: Literal["full", "adapter"]
    base: Path | None = None
    run: Path | None = None
    remote_code: bool = False

    @property
    def network(self) -> Path:
        """The folder that holds the whole network: an adapter's base, else the folder itself."""
        return self.base or self.path


def locate(model: str | Path, remote_code: bool = False) -> Folder:
    """Find and check a model without reading a weight: catalog name, model folder, adapter folder or run folder.

    ``remote_code``: a model that brings code of its own is found too, instead of refused. Raises ModelError: an unknown name
    (the nearest is named), a model not pulled, a folder without weights or with pickles only, broken JSON or safetensors
    headers, a model that asks to run its own code.
    """
    name = str(model)
    stored = model_store.folder_of(name)
    if name in catalog.CATALOG or ("/" in name and not Path(name).exists() and stored.is_dir()):
        if not stored.is_dir():
            raise ModelError(
                f"the model {name!r} is not on this machine yet.\n  Type: tunesmith models pull {name}"
            )
        if found := model_store.problems(stored):
            raise ModelError(
                f"the model {name!r} in {stored} is damaged: {'; '.join(found)}.\n  Type: tunesmith models pull {name}"
            )
        return _inspect(stored, None, remote_code)
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"no model called {name!r}, and no folder of that name. {catalog.nearest(name)}")
    if not path.is_dir():
        raise ModelError(
            f"{path} is a file; expected a folder with config.json and safetensors weights, or a run folder"
        )
    path = path.resolve()
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        if (path / "model").is_dir():
            return _inspect(path / "model", path, remote_code)
        if (path / "recipe.yaml").is_file():
            raise ModelError(
                f"the run {path} has saved no model yet. Let it finish, or resume it with --resume."
            )
    return _inspect(path, _run_of(path), remote_code)


def _inspect(path: Path, run: Path | None, remote_code: bool) -> Folder:
    path = path.resolve()
    if (path / "adapter_config.json").is_file():
        config = headers.read_json(path / "adapter_config.json")
        _refuse_code(config, path / "adapter_config.json", remote_code)
        _weights(path, "adapter_model")
        return Folder(path, "adapter", _base_of(path, config, remote_code), run, remote_code)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json: expected a model folder in the transformers format, an adapter or a run folder"
        )
    _check_full(path, remote_code)
    return Folder(path, "full", None, run, remote_code)


def _check_full(path: Path, remote_code: bool) -> None:
    check_settings(path, remote_code)
    _weights(path, "model")


def check_settings(path: Path, remote_code: bool = False) -> None:
    """Raise ModelError when the JSON files of a model folder are broken or ask for code to be run."""
    for name in SETTINGS:
        if (path / name).is_file():
            _refuse_code(headers.read_json(path / name), path / name, remote_code)


def code_files(folder: Folder) -> list[Path]:
    """The Python files that ``auto_map`` of a model's settings may run: those it names, and all beside them that they may import.

    Raises ModelError for one that is not in the folder.
    """
    found: dict[Path, None] = {}
    for place, name in ((place, name) for place in (folder.network, folder.path) for name in SETTINGS):
        if not (place / name).is_file():
            continue
        for reference in _references(headers.read_json(place / name)):
            file = place / f"{reference.rpartition('.')[0].replace('.', '/')}.py"
            if "--" in reference or not file.is_file():
                raise ModelError(
                    f"{place / name} asks for the code {reference!r}, which is not in that folder; none is fetched to be run.\n"
                    "  Copy the model with its .py files, and with `auto_map` naming them."
                )
            found |= dict.fromkeys([file, *sorted(file.parent.rglob("*.py"))])
    return list(found)


def _references(config: Any) -> Iterator[str]:
    """``module.Class`` of every ``auto_map``, however deep it is nested."""
    for item in config if isinstance(config, list) else []:
        yield from _references(item)
    for key, value in config.items() if isinstance(config, dict) else []:
        if key != "auto_map":
            yield from _references(value)
            continue
        for one in value.values() if isinstance(value, dict) else [value]:
            yield from (str(part) for part in (one if isinstance(one, list) else [one]) if part)


def _weights(path: Path, stem: str) -> None:
    """Check the headers of every weight file; say why when there is none that may be opened."""
    files = headers.weight_files(path, stem)
    for file in files:
        headers.read_header(file)
    if files:
        return
    if refused := headers.pickles(path):
        raise ModelError(
            f"{path} holds its weights as {', '.join(file.name for file in refused)}. Opening a pickle runs code that "
            f"came with it, so tunesmith does not.\n  Type: tunesmith models convert {path}"
        )
    raise ModelError(
        f"{path} has no weights: expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards"
    )


def _refuse_code(config: Any, file: Path, remote_code: bool, where: str = "") -> None:
    """Refuse settings that make a library import code from the folder or fetch a kernel, however deep they are nested."""
    if isinstance(config, list):
        for item in config:
            _refuse_code(item, file, remote_code, where)
        return
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "auto_map" and value and not remote_code:
            raise ModelError(
                f"{file}: `{where}{key}` asks to run code that came with the model; tunesmith runs none.\n"
                "  Use another model; or read the code, and train with trust_remote_code=true."
            )
        kernel = "attn_implementation" in key or "experts_implementation" in key
        if kernel and any("/" in str(id) for id in (value.values() if isinstance(value, dict) else [value])):
            raise ModelError(
                f"{file}: `{where}{key}` names a kernel to fetch from the Hub, {value!r}. Remove the key from the file."
            )
        _refuse_code(value, file, remote_code, f"{where}{key}.")


def _base_of(adapter: Path, config: dict[str, Any], remote_code: bool) -> Path:
    """The full model under an adapter: the path in its config, else the name that tunesmith or the Hub has for it."""
    recorded = record.read(adapter).get("base") or {}
    named = config.get("base_model_name_or_path") or ""
    relative = [str(adapter / place) for place in (recorded.get("relative"), named) if place]
    for place in (named, recorded.get("path"), *relative):
        if place and (Path(place) / "config.json").is_file():
            _check_full(Path(place).resolve(), remote_code)
            return Path(place).resolve()
    for name in (recorded.get("name"), catalog.name_of_repo(named), named):
        if name and model_store.folder_of(name).is_dir():
            _check_full(model_store.folder_of(name), remote_code)
            return model_store.folder_of(name).resolve()
    known = recorded.get("name") or catalog.name_of_repo(named)
    advice = (
        f"Type: tunesmith models pull {known}"
        if known
        else "Put it there, or change base_model_name_or_path in adapter_config.json."
    )
    raise ModelError(
        f"{adapter} is an adapter of {known or named or 'an unnamed model'!r}, which is not on this machine.\n  {advice}"
    )


def _run_of(path: Path) -> Path | None:
    return path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else None
