"""``models convert``: pickled weights to safetensors, checked against the model's config.

Opening a pickle may run code. So another process (``unpickle.py``) does it, which extracts tensors and
refuses anything else. This process reads only the safetensors that the other one wrote.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import TYPE_CHECKING, TypeAlias

from tunesmith import files
from tunesmith.errors import DiskFullError, ModelError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers, model_store
from tunesmith.models.find.locate import Folder, check_settings, locate
from tunesmith.models.load import load
from tunesmith.models.network import has_attributes, transformers_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Names: TypeAlias = dict[str, list[str]]

_TRAINER_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|adapter_model)\.\w+")
"""Pickles next to a model's weights that do not hold them."""


def convert(
    model: str | Path, out: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> JsonObject:
    """Copy the model in the folder (or store entry) ``model`` to the new folder ``out``, with safetensors.

    ``out``: default is the folder's name with ``-safetensors``. Dtypes and values are kept, and a tensor that
    the model ties to another is written once. ``say`` receives lines of progress.

    Returns {"path", "from", "tensors", "parameters", "megabytes", "dtypes"}. Raises ModelError for a pickle
    that holds anything but tensors (its code does not run) and for weights that do not match the config,
    UserError when there is nothing to convert or ``out`` exists.
    """
    source = _find_folder(model)
    target = files.new_target(out or source.with_name(f"{source.name}-safetensors"), "convert")
    check_settings(source)
    pickles = _weight_pickles(source)
    size = sum(path.stat().st_size for path in pickles)
    if files.free_disk_bytes(target.parent) < size:
        raise DiskFullError(f"{target.parent} has too little space: the weights take {size / 1e6:,.0f} MB")
    tied, network = _tied_names(source)
    with files.new_folder(target) as made:
        headers.copy_settings(source, made, skip=(".bin.index.json",))
        count = len(pickles)
        shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        targets = [made / name for name in (shards if count > 1 else ["model.safetensors"])]
        written = _unpickle(pickles, targets, tied, made / ".job.json", say)
        _name_or_index(made, written)
        say("checking names and shapes against the config")
        load.check_weights(made, network, source)
        if _is_language_model(network):
            load.load_model(locate(made))
        tensors = headers.read_tensors(made)
    return {
        "path": str(target),
        "from": [path.name for path in pickles],
        "tensors": len(tensors),
        "parameters": sum(tensor.count for tensor in tensors.values()),
        "megabytes": sum(tensor.size for tensor in tensors.values()) // 10**6,
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
    }


def _find_folder(model: str | Path) -> Path:
    path = Path(model).expanduser()
    path = path if path.is_dir() else model_store.folder_of(str(model))
    if not path.is_dir():
        raise ModelError(f"no folder {str(model)!r}, and no model of that name in {model_store.models()}")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: expected a model folder in the transformers format")
    return path.resolve()


def _weight_pickles(folder: Path) -> list[Path]:
    """Return the shards of an index, or pytorch_model.bin, or the only other pickle. Raises ModelError."""
    if headers.weight_files(folder):
        raise UserError(f"{folder} has its weights as safetensors already: there is nothing to convert")
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        listed = headers.read_json(index).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing or not names:
            name = missing[0] if missing else "no file"
            raise ModelError(f"{index} names {name}, which is not in that folder. Copy the folder again.")
        return [folder / name for name in names]
    pickles = [path for path in headers.pickle_files(folder) if not _TRAINER_FILES.fullmatch(path.name)]
    weights = [path for path in pickles if path.name == "pytorch_model.bin"] or pickles
    if len(weights) != 1:
        found = ", ".join(path.name for path in weights) or "none"
        expected = "expected pytorch_model.bin, its index with shards, or one other weight file"
        raise ModelError(f"{folder}: {expected}; found {found}")
    return weights


def _unpickle(
    pickles: list[Path], targets: list[Path], tied: Names, job: Path, say: Callable[[str], None]
) -> Names:
    """Run ``unpickle.py``. Returns each written file's name and tensor names."""
    arguments = {"pickles": [*map(str, pickles)], "targets": [*map(str, targets)], "tied": tied}
    job.write_text(json.dumps(arguments), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "tunesmith.models.find.unpickle", str(job)]
    written: Names = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                message = json.loads(line)
                written = message.get("written", written)
                if "progress" in message:
                    say(message["progress"])
        errors.seek(0)
        stderr = errors.read().strip()
    job.unlink()
    if process.returncode:
        raise files.disk_error(RuntimeError(stderr), targets[0]) or _unpickle_error(pickles, stderr)
    return written


def _unpickle_error(pickles: list[Path], stderr: str) -> ModelError:
    """Return the error that explains why ``unpickle.py`` failed."""
    names = ", ".join(path.name for path in pickles)
    code = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", stderr)
    if "UnpicklingError" in stderr and code:
        return ModelError(
            f"{pickles[0].parent}: {names} asks for {code.group(1)} when it is opened. Weights need no code: "
            "none of it ran.\n  Get the model from somebody you trust, as safetensors."
        )
    lines = [line for line in stderr.splitlines() if line and not line.startswith("Check the documentation")]
    reason = lines[-1].rstrip(".") if lines else "the process gave no reason"
    return ModelError(
        f"{pickles[0].parent}: {names} cannot be read as weights: {reason}. None of its code ran.\n"
        "  Expected a file that torch.save wrote. Copy it again, or get the model as safetensors."
    )


def _name_or_index(made: Path, written: Names) -> None:
    """Name a single file model.safetensors; write the index of several."""
    if len(written) == 1:
        (name,) = written
        (made / name).rename(made / "model.safetensors")
        return
    size = sum(tensor.size for name in written for tensor in headers.read_header(made / name).values())
    weight_map = {tensor: name for name, tensors in written.items() for tensor in tensors}
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    (made / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _tied_names(folder: Path) -> tuple[Names, type[PreTrainedModel]]:
    """Return the other names that a checkpoint may give each tied tensor, and the architecture's class."""
    load.quiet()
    import torch

    config_file = folder / "config.json"
    architecture = str((headers.read_json(config_file).get("architectures") or ["AutoModelForCausalLM"])[0])
    network = transformers_class(architecture)
    if network is None:
        raise ModelError(f"{config_file}: transformers has no architecture {architecture!r}")
    config = load.load_config(Folder(folder, "full"))
    with torch.device("meta"):
        model = network.from_config(config) if has_attributes(network, "from_config") else network(config)
    prefix = f"{model.base_model_prefix}."  # old checkpoints of the body alone have names without it
    tied = model.all_tied_weights_keys.items()
    return {name: list({kept: 0, kept.removeprefix(prefix): 0}) for name, kept in tied}, network


def _is_language_model(network: type[PreTrainedModel]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return network.__name__ in {"AutoModelForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
