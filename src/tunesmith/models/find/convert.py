"""``models convert``: a folder whose weights are pickles becomes one with safetensors, checked against its own config.

Opening a pickle may run code, so that is done in another process, which takes tensors out of it and refuses all else
(``unpickle.py``). This one never sees the pickle: it reads the safetensors that came out, as it would read anybody's.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.errors import DiskFullError, ModelError, UserError
from tunesmith.models.find import headers, model_store
from tunesmith.models.find.locate import Folder, check_settings, locate
from tunesmith.models.load import load

COPIED = (".json", ".txt", ".model", ".jinja")
"""Settings, tokenizers and templates. Python files and other pickles stay behind."""

OF_A_TRAINER = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|adapter_model)\.\w+")
"""Pickles that lie beside weights and are none."""


def convert(
    model: str | Path, out: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write the model in the folder (or store entry) ``model`` to the new folder ``out`` with its weights as safetensors.

    ``out``: default is the folder's name with ``-safetensors``. Dtypes and values are kept; a tensor that the model ties to
    another is written once. The original is not touched. ``say`` receives lines of progress.

    Returns {"path", "from", "tensors", "parameters", "megabytes", "dtypes"}. Raises ModelError for a pickle that holds anything
    but tensors (none of its code is run) and for weights that are not those of the config, UserError when there is nothing to
    convert or ``out`` exists.
    """
    source = _folder(model)
    target = files.new_target(out or source.with_name(f"{source.name}-safetensors"), "convert")
    check_settings(source)
    pickles = _pickles(source)
    size = sum(path.stat().st_size for path in pickles)
    if files.free_disk_bytes(target.parent) < size:
        raise DiskFullError(f"{target.parent} has too little room: the weights take {size / 1e6:,.0f} MB")
    tied, network = _tied(source)
    with files.new_folder(target) as made:
        for path in source.iterdir():
            if path.is_file() and path.suffix in COPIED and not path.name.endswith(".bin.index.json"):
                shutil.copyfile(path, made / path.name)
        written = _unpickled(
            pickles, [made / name for name in _names(len(pickles))], tied, made / ".job.json", say
        )
        _finish(made, written)
        say("checking names and shapes against the config")
        load.check_weights(made, network, source)
        if load.is_causal(network):
            load.load_model(locate(made))
        found = headers.read_tensors(made)
    return {
        "path": str(target),
        "from": [path.name for path in pickles],
        "tensors": len(found),
        "parameters": sum(tensor.count for tensor in found.values()),
        "megabytes": sum(tensor.size for tensor in found.values()) // 10**6,
        "dtypes": sorted({tensor.dtype for tensor in found.values()}),
    }


def _folder(model: str | Path) -> Path:
    path = Path(model).expanduser()
    path = path if path.is_dir() else model_store.folder_of(str(model))
    if not path.is_dir():
        raise ModelError(f"no folder {str(model)!r}, and no model of that name in {model_store.models()}")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: expected a model folder in the transformers format")
    return path.resolve()


def _pickles(folder: Path) -> list[Path]:
    """The weight files: the shards of an index, pytorch_model.bin, or the one pickle that there is."""
    if headers.weight_files(folder):
        raise UserError(f"{folder} has its weights as safetensors already: there is nothing to convert")
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        places = headers.read_json(index).get("weight_map")
        names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing or not names:
            raise ModelError(
                f"{index} names {missing[0] if missing else 'no file'}, which is not there. Copy the folder again."
            )
        return [folder / name for name in names]
    found = [path for path in headers.pickles(folder) if not OF_A_TRAINER.fullmatch(path.name)]
    whole = [path for path in found if path.name == "pytorch_model.bin"] or found
    if len(whole) != 1:
        listed = ", ".join(path.name for path in whole) or "none"
        raise ModelError(
            f"{folder}: expected pytorch_model.bin, its index with shards, or one other weight file; found {listed}"
        )
    return whole


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _unpickled(
    pickles: list[Path],
    targets: list[Path],
    tied: dict[str, list[str]],
    job: Path,
    say: Callable[[str], None],
) -> dict[str, list[str]]:
    """File -> tensors, as the other process wrote them."""
    job.write_text(
        json.dumps({"pickles": [*map(str, pickles)], "targets": [*map(str, targets)], "tied": tied}),
        encoding="utf-8",
    )
    command = [sys.executable, "-P", "-m", "tunesmith.models.find.unpickle", str(job)]
    written: dict[str, list[str]] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
        ) as process:
            for line in process.stdout or ():
                answer = json.loads(line)
                written = answer.get("written", written)
                if "said" in answer:
                    say(answer["said"])
        errors.seek(0)
        said = errors.read().strip()
    job.unlink()
    if process.returncode:
        raise _refused(pickles, said)
    return written


def _refused(pickles: list[Path], said: str) -> ModelError:
    """Why the other process gave up, from what it wrote to stderr."""
    names = ", ".join(path.name for path in pickles)
    asked = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", said)
    if "UnpicklingError" in said and asked:
        return ModelError(
            f"{pickles[0].parent}: {names} asks for {asked.group(1)} when it is opened. Weights need nothing of the kind, so it "
            "was refused; no code of it ran.\n  Get the model from somebody you trust, as safetensors."
        )
    lines = [line for line in said.splitlines() if line and not line.startswith("Check the documentation")]
    last = lines[-1].rstrip(".") if lines else "it gave no reason"
    return ModelError(
        f"{pickles[0].parent}: {names} cannot be read as weights: {last}. Nothing of it was run.\n"
        "  Expected a file that torch.save wrote. Copy it again, or get the model as safetensors."
    )


def _finish(made: Path, written: dict[str, list[str]]) -> None:
    """One file is called model.safetensors; several get an index."""
    if len(written) == 1:
        (name,) = written
        (made / name).rename(made / "model.safetensors")
        return
    size = sum(tensor.size for name in written for tensor in headers.read_header(made / name).values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {tensor: name for name, tensors in written.items() for tensor in tensors},
    }
    (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _tied(folder: Path) -> tuple[dict[str, list[str]], Any]:
    """(name -> the names under which a checkpoint may keep the same tensor, the architecture's class), from the config alone."""
    load.quiet()
    import torch
    import transformers

    quoted = headers.read_json(folder / "config.json").get("architectures") or ["AutoModelForCausalLM"]
    network = getattr(transformers, str(quoted[0]), None)
    if network is None:
        raise ModelError(f"{folder / 'config.json'}: transformers has no architecture {quoted[0]!r}")
    config = load.load_config(Folder(folder, "full"))
    with torch.device("meta"):
        model = network.from_config(config) if hasattr(network, "from_config") else network(config)
    prefix = f"{model.base_model_prefix}."  # old checkpoints of the body alone have names without it
    tied = {
        name: list(dict.fromkeys([kept, kept.removeprefix(prefix)]))
        for name, kept in model.all_tied_weights_keys.items()
    }
    return tied, network
