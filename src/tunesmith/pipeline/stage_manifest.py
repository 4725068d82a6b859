"""The manifest of a stage: its recipe, the content of its data, its input models, tunesmith's version.

``manifests/NAME.json`` in the folder of a pipeline holds these facts from the moment the stage starts, and
the fingerprint of its result once it has ended. A stage whose facts are the same is not trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tunesmith import __version__, files
from tunesmith.data.read.source import eval_sources
from tunesmith.data.store.encode_source import content_hash
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import record, saved_files
from tunesmith.models.find.locate import locate
from tunesmith.pipeline.pipeline_file import Pipeline, Stage
from tunesmith.runs.run_folder import FREE, flatten, read_mapping

Manifest = JsonObject
"""``tunesmith``, ``recipe``, ``data``, ``inputs`` and ``files``; ``result`` once the stage has ended."""

MOST_REASONS = 6
MOST_PATH = 1000
"""Characters of a text that may be a path."""


def path_of(pipeline: Pipeline, stage: Stage) -> Path:
    return pipeline.folder / "manifests" / f"{stage.name}.json"


def read(pipeline: Pipeline, stage: Stage) -> Manifest | None:
    """Return the recorded manifest of a stage; None for a stage that never started. Raises DataError."""
    path = path_of(pipeline, stage)
    return read_mapping(path) if path.exists() else None


def write(pipeline: Pipeline, stage: Stage, manifest: Manifest) -> None:
    path = path_of(pipeline, stage)
    files.make_folder(path.parent)
    files.replace_file(path, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def describe(pipeline: Pipeline, stage: Stage) -> Manifest:
    """Return the facts of a stage whose input models exist. Raises UserError for data or a model without."""
    data = stage.recipe.data
    sources = [*data.train, *eval_sources(data).values()]
    models = {"model": stage.recipe.model}
    models |= {key: str(pipeline.stage(source).folder) for key, source in stage.inputs.items()}
    return {
        "tunesmith": __version__,
        "recipe": stage.resolved(),
        "data": {source.label: content_hash(source) for source in sources},
        "inputs": {key: fingerprint(model, stage.recipe.trust_remote_code) for key, model in models.items()},
        "files": {name: hash for name, hash in _files_named(stage.recipe.resolved()["objective"])},
    }


def _files_named(value: object, folder: str = ".") -> Iterator[tuple[str, str]]:
    """Yield (path, sha256) of every file that an objective names: by path, or as MODULE:FUNCTION.

    ``folder``: where a module is looked for; a mapping may have a key ``folder`` of its own."""
    if isinstance(value, dict) and isinstance(value.get("folder"), str):
        folder = value["folder"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _files_named(item, folder)
    if isinstance(value, str) and "\0" not in value and len(value) < MOST_PATH:
        module = value.partition(":")[0].replace(".", "/")
        for path in (Path(value), Path(folder) / f"{module}.py") if value else ():
            if path.is_file():
                yield str(path), files.sha256(path)


def fingerprint(model: str | Path, remote_code: bool = False) -> str:
    """Return a hash of a model, with its base model and tokenizer; it takes milliseconds. Raises ModelError.

    Of a full model's weights it covers three samples of each tensor (``record.fingerprint``).
    """
    folder = locate(model, remote_code)
    places = [folder.path] if folder.base is None else [folder.base, folder.path]
    facts = []
    for place in places:
        names = sorted(
            saved_files.READ_BY_LIBRARIES - {"adapter_config.json", "model.safetensors.index.json"}
        )
        settings = [place / name for name in names if not name.endswith(saved_files.WEIGHTS)]
        facts.append(record.file_hashes(place))
        facts.append({path.name: files.sha256(path) for path in settings if path.is_file()})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def changes(before: Manifest, now: Manifest) -> list[str]:
    """Return a line for everything that differs between two manifests and can change the result."""
    lines = []
    if before.get("tunesmith") != now["tunesmith"]:
        lines.append(f"tunesmith: was {before.get('tunesmith')}, is {now['tunesmith']}")
    old, new = flatten(before.get("recipe") or {}), flatten(now["recipe"])
    for key in _different(old, new):
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            lines.append(f"recipe: {key}: was {old.get(key)!r}, is {new.get(key)!r}")
    words = {
        "data": "the content of {} changed",
        "inputs": "the model at the key {} changed",
        "files": "{} changed",
    }
    for part, text in words.items():
        lines += [f"{part}: {text.format(key)}" for key in _different(before.get(part) or {}, now[part])]
    return (
        lines
        if len(lines) <= MOST_REASONS
        else [*lines[:MOST_REASONS], f"and {len(lines) - MOST_REASONS} more"]
    )


def _different(old: JsonObject, new: JsonObject) -> list[str]:
    return [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]


def result_problem(pipeline: Pipeline, stage: Stage, manifest: Manifest) -> str | None:
    """Return what is wrong with the recorded result of a stage; None if it is there, unchanged."""
    recorded = manifest.get("result")
    if recorded is None:
        return "it has not ended"
    try:
        found = fingerprint(stage.folder, stage.recipe.trust_remote_code)
    except UserError as error:
        return f"its result cannot be used: {str(error).splitlines()[0]}"
    return None if found == recorded else f"its result, {stage.folder / 'model'}, changed since it was saved"


def set_aside(pipeline: Pipeline, stage: Stage) -> Path | None:
    """Move the run folder of a stage to ``replaced/NAME-N``. Returns where to; None if there is no folder."""
    if not stage.folder.is_dir():
        return None
    parent = pipeline.folder / "replaced"
    files.make_folder(parent)
    number = next(n for n in range(1, 10**6) if not (parent / f"{stage.name}-{n}").exists())
    target = parent / f"{stage.name}-{number}"
    stage.folder.rename(target)
    files.sync(pipeline.folder)
    return target
