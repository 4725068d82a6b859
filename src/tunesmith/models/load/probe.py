"""``tunesmith.json``, written beside saved weights: which base they belong to, a hash of them, and what the model answered.

On loading, the base's fingerprint, the files and a few logits are compared, so an adapter on the wrong base, files that changed,
or weights which a library read otherwise than they were written, are an error and not a model that is quietly another one.
Logits alone would not do: those of a small update lie within the rounding of bf16, where an adapter of zeros passes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.files import replace_file
from tunesmith.models.find import catalog, model_store, record
from tunesmith.models.find.record import fingerprint as fingerprint
from tunesmith.models.find.record import read as read
from tunesmith.models.heads.head_types import kind_of
from tunesmith.models.load import head_loading, quantization
from tunesmith.models.network import base as network_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("The capital of France is", "def add(a, b):\n    return")
_TOP = 8


def write_probe(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    made: dict[str, Any] | None = None,
) -> None:
    """Write ``tunesmith.json`` into ``folder``, where ``model`` and ``tokenizer`` have just been saved.

    ``model``: the transformers or peft model in memory. Its mode is left as it was. For a peft model the base is the folder
    it was loaded from, which is fingerprinted. ``made``: the adaptation that made an adapter, its keys as in a recipe.
    """
    base = None
    if hasattr(model, "peft_config"):
        path = Path(model.get_base_model().name_or_path)
        in_store = model_store.models().resolve() in path.resolve().parents
        name = path.name.replace("--", "/") if in_store else catalog.name_of_repo(str(path))
        base = {
            "name": name,
            "path": str(path),
            "relative": os.path.relpath(path, folder),  # found again when both were moved together
            "fingerprint": record.fingerprint(path) if path.is_dir() else None,
        }
    written = {
        "format": 1,
        "versions": {
            name: importlib.metadata.version(name) for name in ("tunesmith", "torch", "transformers", "peft")
        },
        "base": base,
        "quantization": quantization.record(model),
        "head": head_loading.head_record(model) if base else None,
        "files": record.files(folder),
        "adaptation": made,
        "probe": {"dtype": str(model.dtype).removeprefix("torch."), "answers": _answers(model, tokenizer)},
    }
    replace_file(folder / record.FILE, json.dumps(written, indent=1).encode())


def verify_probe(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """The largest difference between the logits now and those written at save time; None when the folder has no probe.

    Raises ModelError when a file is not the one saved (``record.check_files``), when the tokenizer gives other ids, or when a
    logit differs by more than rounding explains: 0.2% of the largest one where both were fp32, else 5%, of a head for a task 20%:
    its few numbers are small differences of large ones (0.07 of 1 was seen at 30 layers in bf16).
    """
    record.check_files(folder)
    saved = record.read(folder).get("probe")
    if not saved:
        return None
    exact = saved["dtype"] == "float32" == str(model.dtype).removeprefix("torch.")
    writes = kind_of(type(network_of(model)).__name__) == "lm"
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
            abs(float(logits[token]) - value)
            for token, value in zip(before["tokens"], before["logits"], strict=True)
        )
        if not difference <= scale * allowed:
            raise ModelError(
                f"{folder} does not answer as it did when it was saved: a logit differs by {difference:.3g} (of {scale:.3g}).\n"
                "  The weights, the base or a library changed. Its versions then are in tunesmith.json."
            )
        worst = max(worst, difference)
    return worst


def last_logits(model: PreTrainedModel, ids: list[int]) -> Any:
    """fp32 logits (vocab,) after the last of ``ids``, with dropout off."""
    return all_logits(model, ids)[-1]


def all_logits(model: PreTrainedModel, ids: list[int]) -> Any:
    """fp32 logits (tokens, vocab) after each of ``ids``, with dropout off; (1, labels) where a row has one answer."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return head_loading.answers(model, torch.tensor([ids], device=model.device)).float()
    finally:
        model.train(training)


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    answers = []
    for text in PROMPTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = last_logits(model, ids)
        top = logits.topk(min(_TOP, len(logits)))
        answers.append({"input_ids": ids, "tokens": top.indices.tolist(), "logits": top.values.tolist()})
    return answers
