"""Write ``tunesmith.json`` next to saved weights, and check a loaded model against it.

The record has an adapter's base model, hashes of the files, and a few logits. Loading compares all three, so
an adapter on the wrong base, a changed file, or weights that a library reads otherwise than they were written
are errors. Logits alone would not do: in bf16 an adapter of zeros is within rounding and would pass.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import catalog, model_store, record, saved_files
from tunesmith.models.load import finite, head_loading, quantization
from tunesmith.models.network import is_peft

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("The capital of France is", "def add(a, b):\n    return")
_RECORDED_LOGITS = 8
"""The largest logits after each prompt."""


def write_probe(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    made: JsonObject | None = None,
    trained: JsonObject | None = None,
) -> None:
    """Write ``tunesmith.json`` into ``folder``, where ``model`` and ``tokenizer`` have just been saved.

    ``model``: the transformers or peft model in memory, whose mode is kept. The base of a peft model is the
    folder that it was loaded from. ``made``: the keys under ``adaptation:`` that made an adapter. ``trained``:
    what it was trained with, see ``record.trained``. Raises ModelError when a saved weight is not finite.
    """
    finite.check_saved(folder)
    base = None
    if is_peft(model):
        path = Path(model.get_base_model().name_or_path)
        in_store = model_store.models().resolve() in path.resolve().parents
        base = {
            "name": path.name.replace("--", "/") if in_store else catalog.name_of_repo(str(path)),
            "path": str(path),
            "relative": os.path.relpath(path, folder),  # finds the base when both were moved together
            "fingerprint": record.fingerprint(path) if path.is_dir() else None,
            "content": saved_files.content_of(path) if path.is_dir() else None,
        }
    packages = ("tunesmith", "torch", "transformers", "peft")
    written = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "base": base,
        "quantization": quantization.record(model),
        "head": head_loading.head_record(model) if base else None,
        "files": saved_files.hash_files(folder),
        "adaptation": made,
        "trained": trained,
        "probe": {
            "dtype": _dtype(model),
            "answers": [_largest_logits(model, tokenizer, text) for text in PROMPTS],
        },
    }
    record.write(folder, written)


def verify_probe(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return the largest difference of a logit from the recorded one, None for a folder without record.

    Raises ModelError when the tokenizer returns other ids, or when a logit differs by more than rounding
    explains: 0.2% of the largest one where both are fp32, else 5%. A task head may
    differ by 20%: its few numbers are small differences of large ones (7% was measured, 30 layers in bf16).
    """
    saved = record.read(folder).get("probe")
    if not saved:
        return None
    exact = saved["dtype"] == "float32" == _dtype(model)
    allowed = 0.002 if exact else 0.05 if head_loading.head_of_network(model) == "lm" else 0.2
    differences = [0.0]
    for recorded, text in zip(saved["answers"], PROMPTS, strict=True):
        ids, expected = tokenizer(text, add_special_tokens=False)["input_ids"], recorded["input_ids"]
        if ids != expected:
            raise ModelError(
                f"{folder}: the tokenizer turns {text!r} into {ids}; the saved one, into {expected}.\n"
                "  Copy the folder again."
            )
        logits = all_logits(model, ids)[-1]
        scale = max(1.0, *(abs(value) for value in recorded["logits"]))
        pairs = zip(recorded["tokens"], recorded["logits"], strict=True)
        differences.append(max(abs(float(logits[token]) - value) for token, value in pairs))
        if not differences[-1] <= scale * allowed:
            raise ModelError(
                f"{folder} does not answer as it did when it was saved: a logit differs by "
                f"{differences[-1]:.3g} (of {scale:.3g}).\n"
                "  The weights, the base or a library changed; tunesmith.json lists the earlier versions."
            )
    return max(differences)


def all_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the fp32 logits (tokens, vocab), or (1, labels) of a head for whole rows, with dropout off."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return head_loading.row_logits(model, torch.tensor([ids], device=model.device)).float()
    finally:
        model.train(training)


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _largest_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> JsonObject:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logits = all_logits(model, ids)[-1]
    top = logits.topk(min(_RECORDED_LOGITS, len(logits)))
    return {"input_ids": ids, "tokens": top.indices.tolist(), "logits": top.values.tolist()}
