"""``merge``: a LoRA folded into its base and saved as a plain transformers folder, which needs no peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import files
from tunesmith.errors import ModelError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.generate import stop_tokens
from tunesmith.models.load import load, merge_weights, probe
from tunesmith.models.load import quantization as quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_DIFFERENCE, LARGEST_KL = 1e-3, 1e-4
"""Limits in fp32: a logit's difference, relative to the largest logit, and KL(adapter || merged) at any
token, in nats. Above either the merged model is another model than the adapter on its base."""

LARGEST_ROUNDING = {"bfloat16": 0.1, "float16": 0.01}
"""Limit of KL(adapter || merged) for the folder as saved, at any token, in nats; LARGEST_KL for other dtypes.
Rounding stays far below: six adapters on smollm2-135m had 0.004 to 0.017 in bf16. Rounding the base alone
gives 0.010 in bf16, 0.0001 in fp16."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(model: str | Path, out: str | Path, *, dtype: str = "auto") -> JsonObject:
    """Fold the adapter ``model`` into its base and write the result to the new folder ``out``.

    The sum is computed in fp32 (a 4-bit or 8-bit base is de-quantised first) and saved in ``dtype``: float32,
    bfloat16, float16, or auto (the base's dtype; float32 with a task head). The folder also has the adapter's
    tokenizer and chat template, and the base's generation config with every stop id. Tied embeddings stay
    tied unless the adapter changed one of them. Adapter and merged model are compared at every token of the
    probe: in fp32 before anything is written, and as saved before the folder gets its name.

    Returns {"path", "base", "adapter", "dtype", "tied_embeddings", "parameters", "max_logit_difference",
    "max_logit_difference_saved", "max_kl", "max_kl_saved", "quantization"}: the largest difference of a logit
    and the largest KL(adapter || merged) in nats, in fp32 and of the saved folder (rounding to ``dtype``
    included), and how the base was quantised in training. Raises UserError when ``out`` exists or there is
    nothing to merge, ModelError when the two models differ.
    """
    folder = locate(model)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"unknown dtype {dtype!r}; expected one of auto, {', '.join(DTYPES)}")
    target = files.new_target(out, "merge")
    if folder.base is None:
        raise UserError(f"{folder.path} is a full model, not an adapter: there is nothing to merge")
    folded = fold(folder, dtype)
    with files.new_folder(target) as temporary:
        reloaded, difference_saved, kl_saved = write(folded, temporary)
    first, last = reloaded.get_input_embeddings(), reloaded.get_output_embeddings()
    return {
        "path": str(target),
        "base": str(folder.base),
        "adapter": str(folder.path),
        "dtype": folded.dtype,
        "tied_embeddings": last is not None and first.weight is last.weight,
        "parameters": reloaded.num_parameters(),
        "max_logit_difference": folded.difference,
        "max_logit_difference_saved": difference_saved,
        "max_kl": folded.divergence,
        "max_kl_saved": kl_saved,
        "quantization": folded.quantization,
    }


@dataclass(frozen=True)
class FoldedAdapter:
    """``model``: an adapter folded into its base, in memory, in the dtype it will be saved in.

    ``logits``: of the adapter on its base, fp32 (tokens, vocab) for each of ``prompts``. ``difference`` and
    ``divergence``: the largest logit difference and KL of the fp32 sum.
    """

    source: Folder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    difference: float
    divergence: float
    quantization: str | None

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def fold(folder: Folder, dtype: str = "auto") -> FoldedAdapter:
    """Fold the adapter of ``folder``, whose probe must match, into its base.

    Raises ModelError when the merged model gives other logits.
    """
    saved_dtype = _automatic_dtype(folder) if dtype == "auto" else DTYPES[dtype]
    tokenizer = load.load_tokenizer(folder)
    fp32 = torch.float32
    attached = load.load_model(folder, dtype=fp32)
    probe.verify_probe(folder.path, attached, tokenizer)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in probe.PROMPTS]
    logits = [probe.all_logits(attached, ids) for ids in prompts]
    base = quantized.record(attached)
    merged = (
        merge_weights.merge_into_base(attached)
        if base is None
        else load.load_model(folder, dtype=fp32, adapter="merge")
    )
    del attached
    scale = max(1.0, *(float(of_prompt.abs().max()) for of_prompt in logits))
    difference, divergence = _compare(merged, prompts, logits)
    if not (difference <= LARGEST_DIFFERENCE * scale and divergence <= LARGEST_KL):
        raise ModelError(
            f"merging {folder.path} would change its answers: a logit differs by {difference:.3g} (of {scale:.3g}), and "
            f"KL(adapter || merged) is {divergence:.3g} (at most {LARGEST_KL:g}).\n"
            "  Nothing was written. Use the adapter as it is."
        )
    quantization = base["quant_type"] if base else None
    model = merged.to(saved_dtype)
    return FoldedAdapter(folder, model, tokenizer, prompts, logits, difference, divergence, quantization)


def _automatic_dtype(folder: Folder) -> torch.dtype:
    """Return the base's dtype, or fp32 for a model with a task head.

    The few outputs of a task head are small differences of large numbers: in bf16, rewards moved by 0.045.
    """
    return load.checkpoint_dtype(folder.network) if load.head_of(folder) == "lm" else torch.float32


def write(folded: FoldedAdapter, folder: Path) -> tuple[PreTrainedModel, float, float]:
    """Fill the empty ``folder`` with the model, its tokenizer and a probe.

    Returns the model loaded from there, and the largest logit difference and KL(adapter || merged) in nats
    between it and the adapter. Raises ModelError when the KL is larger than rounding explains.
    """
    folded.model.save_pretrained(folder)
    folded.tokenizer.save_pretrained(folder)
    stop_tokens.save_stop_ids(folder, folded.model, folded.tokenizer)
    trained = record.trained(folded.source.path)
    probe.write_probe(folder, folded.model, folded.tokenizer, trained=trained or None)
    reloaded = load.load_model(locate(folder, folded.source.remote_code))
    difference, divergence = _compare(reloaded, folded.prompts, folded.logits)
    largest = LARGEST_ROUNDING.get(folded.dtype, LARGEST_KL)
    if not divergence <= largest:
        adapter = folded.source.path
        raise ModelError(
            f"merging {adapter} in {folded.dtype} would change its answers: KL(adapter || merged) is {divergence:.3g} nats "
            f"after rounding (at most {largest:g}).\n"
            f"  Nothing is kept. Type: tunesmith merge {adapter} --dtype float32 --out NEW_FOLDER"
        )
    return reloaded, difference, divergence


def _compare(
    model: PreTrainedModel, prompts: list[list[int]], before: list[torch.Tensor]
) -> tuple[float, float]:
    """Return the largest difference of a logit, and the largest KL(before || model) in nats."""
    differences, divergences = [], []
    for ids, old in zip(prompts, before, strict=True):
        new = probe.all_logits(model, ids)
        log_p, log_q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        differences.append((old - new).abs().max())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).max())
    # torch's maximum is nan where a value is; Python's may not be.
    return float(torch.stack(differences).max()), float(torch.stack(divergences).max().clamp(min=0))
