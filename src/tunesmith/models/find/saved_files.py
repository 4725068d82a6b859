"""Every file of a saved model, compared with its sha256 in ``tunesmith.json`` or in the store's manifest.

``check_settings`` hashes all but the weights, in milliseconds, whenever a folder is located. The weights are
hashed by ``checking_weights`` in the background of every load: sha256 reads about 1 GB a second on one core,
which takes less time than loading. A folder that neither tunesmith nor ``models pull`` wrote has no hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

from tunesmith.errors import ModelError, UserError
from tunesmith.files import sha256
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers, model_store, record

WEIGHTS = ".safetensors"

READ_BY_LIBRARIES = frozenset((
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "vocab.txt", "adapter_config.json", "adapter_model.safetensors", "model.safetensors",
    "model.safetensors.index.json",
))  # fmt: skip
"""A file with one of these names changes what is loaded, so adding one to a saved model is an error, too."""

_NOT_LOADED = (record.FILE, model_store.MANIFEST, "README.md")

State = Literal["ok", "changed", "missing", "added", "not recorded"]


class FileState(TypedDict):
    """A file of a saved model.

    ``expected``: its recorded sha256. ``found``: its present sha256. None = there is none.
    """

    name: str
    state: State
    expected: str | None
    found: str | None


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in ``folder``, except the record and the model card (``README.md``)."""
    return {name: hash for name in _names(folder) if (hash := _hash(folder, name)) is not None}


def _names(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name not in _NOT_LOADED]


def _hash(folder: Path, name: str) -> str | None:
    """Return the sha256 of a file, None if it cannot be read.

    The config of an adapter is hashed as JSON, without the path of the base model, which may move.
    """
    if name != "adapter_config.json":
        inside = (folder / name).is_file() and ".." not in Path(name).parts and not Path(name).is_absolute()
        with suppress(OSError):
            return sha256(folder / name) if inside else None
        return None
    settings = headers.read_json(folder / name) | {"base_model_name_or_path": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 that was recorded for each file when it was saved or pulled; {} without a record.

    A record of format 1 has the weights and ``adapter_config.json`` alone.
    """
    if (folder / record.FILE).is_file():
        listed = record.read(folder).get("files") or {}
        if not isinstance(listed, dict):
            raise ModelError(
                f"{folder / record.FILE}: expected `files` to map names to sha256. Copy the folder again."
            )
        return {str(name): str(hash) for name, hash in listed.items()}
    if model_store.models().resolve() in folder.resolve().parents:
        listed = (model_store.manifest(folder) or {}).get("files", {})
        return {name: str(facts["sha256"]) for name, facts in listed.items() if name not in _NOT_LOADED}
    return {}


def check_settings(folder: Path) -> None:
    """Raise ModelError when a file other than the weights was changed, removed or added since it was saved."""
    expected = {name: hash for name, hash in recorded_hashes(folder).items() if not name.endswith(WEIGHTS)}
    _require_unchanged(folder, _differing(folder, expected) + [f"{name} (added)" for name in _added(folder)])


def _added(folder: Path) -> list[str]:
    """Return the files that libraries would read but the record does not list."""
    written = record.read(folder)
    if written.get("format") != record.FORMAT or not written.get("files"):
        return []
    expected = recorded_hashes(folder)
    return sorted(name for name in READ_BY_LIBRARIES - expected.keys() if (folder / name).is_file())


@contextmanager
def checking_weights(folder: Path, base: Path | None = None) -> Iterator[None]:
    """Hash the weights of a model, and of an adapter's base, while the block loads them.

    Raises ModelError at the end of the block if the weights changed. If loading failed, too, this error is
    raised instead, because it names the cause. A base without recorded hashes is compared with the hash that
    its adapter recorded.
    """
    pool = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)))
    try:
        running = [*_submit(pool, folder), *(_submit(pool, base) if base else ())]
        content = _recorded_content(folder, base) if base else None
        base_content = pool.submit(record.fingerprint, base, True) if base and content else None
        try:
            yield
        except ModelError:
            _require_same_weights(running)
            raise
        _require_same_weights(running)
        if base_content is not None and base_content.result() != content:
            raise ModelError(
                f"{base}: the weights changed since the adapter {folder} was trained on them.\n"
                "  Restore the model it was trained on, or train again."
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, folder: Path) -> list[tuple[Path, str, Future[bool]]]:
    hashes = recorded_hashes(folder).items()
    wanted = [(name, hash) for name, hash in hashes if name.endswith(WEIGHTS)]
    return [(folder, name, pool.submit(_is_same, folder, name, hash)) for name, hash in wanted]


def content_of(base: Path) -> str | None:
    """Return a hash of all weights of a base model that has no recorded hashes; None if it has them.

    The hash is computed once per process.
    """
    if recorded_hashes(base):
        return None
    files = [(file.stat().st_mtime_ns, file.stat().st_size) for file in headers.weight_files(base)]
    return _content(base, tuple(files))


@cache
def _content(base: Path, files: tuple[tuple[int, int], ...]) -> str:
    return record.fingerprint(base, whole=True)


def _recorded_content(adapter: Path, base: Path) -> str | None:
    return None if recorded_hashes(base) else (record.read(adapter).get("base") or {}).get("content")


def _require_same_weights(running: list[tuple[Path, str, Future[bool]]]) -> None:
    for folder in dict.fromkeys(folder for folder, *_ in running):
        _require_unchanged(folder, [name for of, name, same in running if of == folder and not same.result()])


def _is_same(folder: Path, name: str, expected: str) -> bool:
    if name == "*.safetensors":  # a full model in a record of format 1
        return record.fingerprint(folder) == expected
    return _hash(folder, name) == expected


def _differing(folder: Path, expected: dict[str, str]) -> list[str]:
    names = sorted(name for name, hash in expected.items() if not _is_same(folder, name, hash))
    return [name if (folder / name).exists() else f"{name} (missing)" for name in names]


def _require_unchanged(folder: Path, names: Iterable[str]) -> None:
    if not (listed := list(names)):
        return
    if record.read(folder):
        raise ModelError(
            f"{folder}: {', '.join(listed)} changed since the model was saved: the sha256 differs.\n"
            f"  Copy the folder again. If you changed it on purpose, type: tunesmith verify {folder} --accept"
        )
    raise ModelError(
        f"{folder}: {', '.join(listed)} changed since the model was pulled: the sha256 differs.\n"
        f"  Type: tunesmith models pull {folder.name.replace('--', '/')}"
    )


def verify(folder: Path) -> list[FileState]:
    """Compare every file of a model folder with its recorded hash. Raises ModelError for an unreadable record."""
    expected, names = recorded_hashes(folder), _names(folder)
    if old := expected.pop("*.safetensors", None):
        same = record.fingerprint(folder) == old
        weights = [file.name for file in headers.weight_files(folder)]
        expected |= {name: sha256(folder / name) if same else old for name in weights}
    added = _added(folder)
    states: list[FileState] = []
    for name in sorted({*expected, *names}):
        found, hash = _hash(folder, name), expected.get(name)
        if hash is None:
            state: State = "added" if name in added else "not recorded"
        else:
            state = "missing" if found is None else "ok" if found == hash else "changed"
        states.append({"name": name, "state": state, "expected": hash, "found": found})
    return states


def accept(folder: Path) -> JsonObject:
    """Record the files of a model folder as they are now, without logits. Returns the new record.

    A folder that tunesmith did not write gets a record. Raises UserError for an entry of the store.
    """
    if model_store.models().resolve() in folder.resolve().parents:
        raise UserError(
            f"{folder} belongs to the store, which `tunesmith models pull` repairs. Copy it first."
        )
    before = headers.read_json_if_present(folder / record.FILE)
    record.write(folder, before | {"files": hash_files(folder), "probe": None})
    return record.read(folder)
