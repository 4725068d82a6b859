"""Describe the base model, tokenizer and chat template that a run started with, and check them on resume.

Every checkpoint has the description. If one of them changed, the resumed run would differ, although its
recipe and data are the same.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import files
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers
from tunesmith.models.find.locate import SETTINGS, code_files
from tunesmith.runs.run_folder import flatten
from tunesmith.train.setup import Setup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED = {"transformers_version", "_name_or_path", "base_model_name_or_path"}
"""Keys of a config that do not change the model: versions, and paths of folders that may move."""

_CONTEXT, _MOST = 24, 160
"""Characters printed of a changed template: before and after the change, and at most in all."""

_MOST_LINES = 12


class StartingPoint:
    """Description of this process's base model. A thread hashes all weights while the network is loaded."""

    def __init__(self, ready: Setup) -> None:
        self._ready = ready
        self._folders = _folders(ready)
        self._weights = _in_thread(lambda: _hash_weights(self._folders))
        self._settings = _describe_settings(ready, self._folders)

    def facts(self) -> JsonObject:
        """Return hashes of weights and code, the settings, the tokenizer and its template, as JSON.

        An adapter's files have the prefix ``adapter/``, because its base model has files of the same names.
        """
        return {"weights": self._weights.result(), **self._settings}

    def check_same(self, state: JsonObject) -> None:
        """Raise RecipeError with the differences if a checkpoint's ``state`` has other data or base model."""
        _check_data(self._ready, state)
        before: JsonObject | None = state.get("base")
        if not before or not (changed := _differences(before, self.facts())):
            return
        more = [f"... and {len(changed) - _MOST_LINES} more"] if len(changed) > _MOST_LINES else []
        raise RecipeError(
            "the base model changed since the run was started, so resuming would not continue the same run:\n  "
            + "\n  ".join([*changed[:_MOST_LINES], *more])
            + f"\n  Restore the files of {self._ready.model_folder.path}, or start another run with --out DIR."
        )


def _folders(ready: Setup) -> dict[str, Path]:
    """Return the folders of the model, by the prefix that ``facts`` adds to their files' names."""
    folder = ready.model_folder
    return {"": folder.network} | ({"adapter/": folder.path} if folder.base else {})


def _in_thread(work: Callable[[], dict[str, str]]) -> Future[dict[str, str]]:
    """Start ``work`` in a thread that ends with the process."""
    future: Future[dict[str, str]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised by ``result``
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _hash_weights(folders: Mapping[str, Path]) -> dict[str, str]:
    stems = {"": "model", "adapter/": "adapter_model"}
    return {
        f"{at}{file.name}": files.sha256(file)
        for at, folder in folders.items()
        for file in headers.weight_files(folder, stems[at])
    }


def _describe_settings(ready: Setup, folders: Mapping[str, Path]) -> JsonObject:
    """Return code, settings, template and tokenizer (the loaded one, whatever files it comes from)."""
    folder, tokenizer = ready.model_folder, ready.tokenizer
    names = [*(name for name in SETTINGS if not name.startswith("tokenizer")), "adapter_config.json"]
    return {
        "code": {
            file.name: files.sha256(file) for file in (code_files(folder) if folder.remote_code else ())
        },
        "settings": {
            f"{at}{name}": _without_ignored(headers.read_json_if_present(place / name))
            for at, place in folders.items()
            for name in names
        },
        "tokenizer": _describe_tokenizer(tokenizer),
        "template": tokenizer.chat_template,
    }


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Return a hash of each part of the tokenizer, and its special tokens by name."""
    backend = tokenizer.backend_tokenizer
    parts: dict[str, bytes] = {
        name: b"" if part is None else part.__getstate__()  # the part as JSON
        for name, part in (
            ("model", backend.model), ("normalizer", backend.normalizer), ("pre_tokenizer", backend.pre_tokenizer),
            ("post_processor", backend.post_processor), ("decoder", backend.decoder),
        )
    }  # fmt: skip
    parts["added_tokens"] = repr(sorted(backend.get_added_tokens_decoder().items())).encode()
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {**{name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}, **tokens}


def _differences(before: JsonObject, now: JsonObject) -> list[str]:
    """Return a line for each weight file, code file, setting and part of the tokenizer that differs."""
    lines = []
    for kind in ("weights", "code"):
        lines += [f"{name}: the content differs" for name in _changed(before[kind], now[kind])]
    for name, content in now["settings"].items():
        old, new = flatten(before["settings"].get(name, {})), flatten(content)
        lines += [f"{name}: {key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in _changed(old, new)]
    old, new = before["tokenizer"], now["tokenizer"]
    for key in _changed(old, new):
        shown = f": was {old.get(key)!r}, is {new.get(key)!r}" if key.endswith("_token") else " differs"
        lines.append(f"tokenizer: {key}{shown}")
    if before["template"] != now["template"]:
        lines.append(f"chat template: {_template_difference(before['template'], now['template'])}")
    return lines


def _changed(old: JsonObject, new: JsonObject) -> list[str]:
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _template_difference(old: object, new: object) -> str:
    """Return the part of two templates that differs, with a few characters around it."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return f"was {_cut(str(old))}, is {_cut(str(new))}"
    start = _shared(old, new)
    end = _shared(old[start:][::-1], new[start:][::-1])
    first, after = max(0, start - _CONTEXT), max(0, end - _CONTEXT)
    was, is_ = (text[first : len(text) - after] for text in (old, new))
    line = 1 + old.count("\n", 0, start)
    return f"line {line}: was {_cut(was)}, is {_cut(is_)}"


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix of both texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _cut(text: str) -> str:
    return repr(text if len(text) <= _MOST else f"{text[: _MOST - 1]}…")


def _without_ignored(content: JsonObject) -> JsonObject:
    return {key: value for key, value in content.items() if key not in _IGNORED}


def _check_data(ready: Setup, state: JsonObject) -> None:
    before = {source["path"]: source for source in state["data"]}
    for source in ready.data.report.as_dict()["sources"]:
        path = source["path"]
        old = before.get(path, {})
        if old.get("sha256") != source["sha256"]:
            commit = old.get("revision")
            restore = (
                f"Type `tunesmith data pull` again with --commit {commit}"
                if commit
                else "Restore the old file"
            )
            raise RecipeError(
                f"the data file {path} changed since the run was started, so resuming would not continue the same run.\n"
                f"  {restore}, or start another run with --out DIR."
            )
    if state.get("held_out") != ready.data.report.held_out_digest:
        raise RecipeError(
            "this tunesmith holds out other rows (data.eval.fraction) than the version that the run was started with, so a "
            "resumed run would be evaluated on rows that it was trained on.\n"
            "  Finish it with that version, or start another run with --out DIR."
        )
