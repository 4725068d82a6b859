"""``tunesmith.json``, written beside saved weights: which base they belong to, a hash of them, and what the model answered.

On loading, the base's fingerprint, the files and a few logits are compared, so an adapter on the wrong base, files that changed,
or weights which a library read otherwise than they were written, are an error and not a model that is quietly another one.
Logits alone would not do: those of a small update lie within the rounding of bf16, where an adapter of zeros passes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.models.find import catalog, headers, store
from tunesmith.models.load import head_loading, quantization

FILE = "tunesmith.json"
PROMPTS = ("The capital of France is", "def add(a, b):\n    return")
_TOP = 8
_SAMPLE = 4096
"""Bytes hashed at the start, the middle and the end of each tensor."""


def fingerprint(folder: Path) -> str:
    """A hash of a full model that does not depend on how it is sharded: names, dtypes, shapes, and samples of every tensor.

    Reads about 12 kB of each tensor, so it takes milliseconds; a training step changes every sample it reaches.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(headers.read_tensors(folder).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as file:
            for offset in (0, max(0, tensor.size // 2 - _SAMPLE // 2), max(0, tensor.size - _SAMPLE)):
                file.seek(tensor.start + offset)
                digest.update(file.read(min(_SAMPLE, tensor.size - offset)))
    return digest.hexdigest()


def files(folder: Path) -> dict[str, str]:
    """What is kept of the saved weights: of an adapter a sha256 of each file and of its config, of a full model its fingerprint.

    The config counts as JSON, whatever its spaces, and without the path of the base, which may move and is compared by itself.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return {"*.safetensors": fingerprint(folder)}
    found = {}
    for path in headers.weight_files(folder, "adapter_model"):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    settings = headers.read_json(config) | {"base_model_name_or_path": None}
    return found | {config.name: hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


def read(folder: Path) -> dict[str, Any]:
    """The probe file of a folder; empty when there is none (a folder that tunesmith did not write)."""
    return headers.read_json(folder / FILE) if (folder / FILE).is_file() else {}


def head(folder: Path) -> dict[str, Any]:
    """``type`` (score, token, span) and ``config`` of an adapter's head: an adapter brings no config.json. Empty for a language
    model, and for an adapter that tunesmith did not write."""
    return read(folder).get("head") or {}


def write_probe(folder: Path, model: Any, tokenizer: Any, made: dict[str, Any] | None = None) -> None:
    """Write ``tunesmith.json`` into ``folder``, where ``model`` and ``tokenizer`` have just been saved.

    ``model``: the transformers or peft model in memory. Its mode is left as it was. For a peft model the base is the folder
    it was loaded from, which is fingerprinted. ``made``: the adaptation that made an adapter, its keys as in a recipe.
    """
    base = None
    if hasattr(model, "peft_config"):
        path = Path(model.get_base_model().name_or_path)
        in_store = store.models().resolve() in path.resolve().parents
        name = path.name.replace("--", "/") if in_store else catalog.name_of_repo(str(path))
        base = {
            "name": name,
            "path": str(path),
            "relative": os.path.relpath(path, folder),  # found again when both were moved together
            "fingerprint": fingerprint(path) if path.is_dir() else None,
        }
    record = {
        "format": 1,
        "versions": {name: importlib.metadata.version(name) for name in ("tunesmith", "torch", "transformers", "peft")},
        "base": base,
        "quantization": quantization.record(model),
        "head": head_loading.record(model) if base else None,
        "files": files(folder),
        "adaptation": made,
        "probe": {"dtype": str(model.dtype).removeprefix("torch."), "answers": _answers(model, tokenizer)},
    }
    path = folder / FILE
    with path.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def check_base(adapter: Path, base: Path) -> None:
    """Raise ModelError when ``base`` is not the model that the adapter was trained on. Nothing is known of foreign adapters."""
    recorded = read(adapter).get("base") or {}
    expected = recorded.get("fingerprint")
    if expected and fingerprint(base) != expected:
        name = recorded.get("name") or recorded.get("path")
        raise ModelError(
            f"{adapter} was trained on another model than {base}: the weights of {name} changed or come from another source.\n"
            "  Put back the model that it was trained on (for a catalog model: the same source), or train the adapter again."
        )


def check_files(folder: Path) -> None:
    """Raise ModelError when the weights are not the files that were saved. Of a folder that kept no hashes nothing is known."""
    saved = read(folder).get("files")
    if not saved:
        return
    now = files(folder)
    if changed := sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name)):
        raise ModelError(
            f"{folder}: {', '.join(changed)} changed since the model was saved: its sha256 is another one.\n"
            f"  Copy the folder again. If you changed it on purpose, take `files` and `probe` out of {FILE} there."
        )


def verify_probe(folder: Path, model: Any, tokenizer: Any) -> float | None:
    """The largest difference between the logits now and those written at save time; None when the folder has no probe.

    Raises ModelError when a file is not the one saved (:func:`check_files`), when the tokenizer gives other ids, or when a logit
    differs by more than rounding explains: 0.2% of the largest one where both were fp32, else 5%, of a head for a task 20%:
    its few numbers are small differences of large ones (0.07 of 1 was seen at 30 layers in bf16).
    """
    from tunesmith.models.heads import lm_head as networks
    from tunesmith.models.heads import task_heads

    check_files(folder)
    saved = read(folder).get("probe")
    if not saved:
        return None
    exact = saved["dtype"] == "float32" == str(model.dtype).removeprefix("torch.")
    writes = task_heads.kind_of(type(networks.base(model)).__name__) == "lm"
    allowed = 0.002 if exact else 0.05 if writes else 0.2
    worst = 0.0
    for before, text in zip(saved["answers"], PROMPTS, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != before["input_ids"]:
            raise ModelError(
                f"{folder}: the tokenizer turns {text!r} into {ids}; when the model was saved it gave {before['input_ids']}"
            )
        logits = last_logits(model, ids)
        scale = max(1.0, *(abs(value) for value in before["logits"]))
        difference = max(
            abs(float(logits[token]) - value) for token, value in zip(before["tokens"], before["logits"], strict=True)
        )
        if not difference <= scale * allowed:
            raise ModelError(
                f"{folder} does not answer as it did when it was saved: a logit differs by {difference:.3g} (of {scale:.3g}).\n"
                "  The weights, the base or a library changed. Its versions then are in tunesmith.json."
            )
        worst = max(worst, difference)
    return worst


def last_logits(model: Any, ids: list[int]) -> Any:
    """fp32 logits (vocab,) after the last of ``ids``, with dropout off."""
    return all_logits(model, ids)[-1]


def all_logits(model: Any, ids: list[int]) -> Any:
    """fp32 logits (tokens, vocab) after each of ``ids``, with dropout off; (1, labels) where a row has one answer."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return head_loading.answers(model, torch.tensor([ids], device=model.device)).float()
    finally:
        model.train(training)


def _answers(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    answers = []
    for text in PROMPTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = last_logits(model, ids)
        top = logits.topk(min(_TOP, len(logits)))
        answers.append({"input_ids": ids, "tokens": top.indices.tolist(), "logits": top.values.tolist()})
    return answers
