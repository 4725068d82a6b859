"""``merge``: a LoRA folded into its base, saved as a plain transformers folder that needs no peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import files
from tunesmith.errors import ModelError, UserError
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.load import load, probe
from tunesmith.models.load import quantization as quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_DIFFERENCE, LARGEST_KL = 1e-3, 1e-4
"""Of the largest logit; and of KL(adapter || merged) at any token, in nats. Above either the merged model would be another one
than the adapter on its base."""

LARGEST_ROUNDING = {"bfloat16": 0.1, "float16": 0.01}
"""KL(adapter || merged) of the folder as saved, at any token, in nats; of other dtypes LARGEST_KL. Rounding stays far below:
six adapters on smollm2-135m came to 0.004 to 0.017 in bf16. Its plain base moves by 0.010 in bf16, by 0.0001 in fp16."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def merge(model: str | Path, out: str | Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Fold the adapter ``model`` into its base and write the result to the new folder ``out``.

    The sum is made in fp32 (of a base of 4 or 8 bits: on the numbers that its bits stand for) and saved in ``dtype`` (auto = the
    base's, float32, bfloat16, float16), with the adapter's tokenizer and chat template and the base's generation config. Tied
    embeddings stay tied unless the adapter itself trained them apart. Adapter and merged model are compared at every token of the
    probe: in fp32 before anything is written, and as saved before the folder gets its name.

    Returns {"path", "base", "adapter", "dtype", "tied_embeddings", "parameters", "max_logit_difference",
    "max_logit_difference_saved", "max_kl", "max_kl_saved", "quantization"}: the largest difference of a logit and the largest
    KL(adapter || merged) in nats, in fp32 and of the folder as saved (rounding to ``dtype`` included), and how the base was
    quantised while the adapter was trained. Raises UserError when ``out`` exists or there is nothing to merge, ModelError when
    the two models differ.
    """
    folder = locate(model)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    target = files.new_target(out, "merge")
    if folder.base is None:
        raise UserError(
            f"{folder.path} is a full model: there is no adapter in it, so there is nothing to merge"
        )
    folded = fold(folder, dtype)
    with files.new_folder(target) as made:
        reloaded, *saved = write(folded, made)
    ends = reloaded.get_input_embeddings(), reloaded.get_output_embeddings()
    return {
        "path": str(target),
        "base": str(folder.base),
        "adapter": str(folder.path),
        "dtype": str(folded.plain.dtype).removeprefix("torch."),
        "tied_embeddings": ends[1] is not None and ends[0].weight is ends[1].weight,
        "parameters": reloaded.num_parameters(),
        "max_logit_difference": folded.difference,
        "max_logit_difference_saved": saved[0],
        "max_kl": folded.divergence,
        "max_kl_saved": saved[1],
        "quantization": folded.quantization,
    }


@dataclass(frozen=True)
class Folded:
    """An adapter folded into its base, in memory, in the dtype it is to be saved in.

    ``before``: fp32 logits of the adapter at every token of each of ``prompts``; ``difference`` and ``divergence``: how far the
    fp32 sum is from them.
    """

    source: Folder
    plain: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    before: list[Any]
    difference: float
    divergence: float
    quantization: str | None


def fold(folder: Folder, dtype: str = "auto") -> Folded:
    """The adapter of ``folder``, which must be as it was saved, in its base. Raises ModelError when the sum answers otherwise."""
    import torch

    kept = load.checkpoint_dtype(folder.network) if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load.load_tokenizer(folder)
    attached = load.load_model(folder, dtype=torch.float32)
    probe.verify_probe(folder.path, attached, tokenizer)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in probe.PROMPTS]
    before = [probe.all_logits(attached, ids) for ids in prompts]
    base = quantized.record(attached)
    plain = (
        load.merge_into_base(attached)
        if base is None
        else load.load_model(folder, dtype=torch.float32, adapter="merge")
    )
    del attached
    scale = max(1.0, *(float(logits.abs().max()) for logits in before))
    difference, divergence = _apart(plain, prompts, before)
    if not (difference <= LARGEST_DIFFERENCE * scale and divergence <= LARGEST_KL):
        raise ModelError(
            f"merging {folder.path} would change its answers: a logit differs by {difference:.3g} (of {scale:.3g}), and "
            f"KL(adapter || merged) is {divergence:.3g} (at most {LARGEST_KL:g}).\n"
            "  Nothing was written. Use the adapter as it is."
        )
    return Folded(
        folder,
        plain.to(kept),
        tokenizer,
        prompts,
        before,
        difference,
        divergence,
        base["quant_type"] if base else None,
    )


def write(folded: Folded, folder: Path) -> tuple[Any, float, float]:
    """Fill the empty ``folder`` with the model, its tokenizer and a probe.

    Returns the model loaded from there, and how far its logits are from the adapter's: the largest difference, and the largest
    KL(adapter || merged) in nats. Raises ModelError when that is more than rounding explains.
    """
    folded.plain.save_pretrained(folder)
    folded.tokenizer.save_pretrained(folder)
    probe.write_probe(folder, folded.plain, folded.tokenizer)
    reloaded = load.load_model(locate(folder, folded.source.remote_code))
    difference, divergence = _apart(reloaded, folded.prompts, folded.before)
    dtype = str(folded.plain.dtype).removeprefix("torch.")
    largest = LARGEST_ROUNDING.get(dtype, LARGEST_KL)
    if not divergence <= largest:
        raise ModelError(
            f"merging {folded.source.path} in {dtype} would change its answers: KL(adapter || merged) is {divergence:.3g} nats "
            f"once it is rounded (at most {largest:g}).\n"
            f"  Nothing is kept. Type: tunesmith merge {folded.source.path} --dtype float32 --out NEW_FOLDER"
        )
    return reloaded, difference, divergence


def _apart(model: PreTrainedModel, prompts: list[list[int]], before: list[Any]) -> tuple[float, float]:
    """The largest difference of a logit from ``before``, and the largest KL(before || model) at any token, in nats."""
    import torch

    after = [probe.all_logits(model, ids) for ids in prompts]
    pairs = [
        (one.double().log_softmax(-1), other.double().log_softmax(-1))
        for one, other in zip(before, after, strict=True)
    ]
    difference = torch.stack(
        [(one - other).abs().max() for one, other in zip(before, after, strict=True)]
    ).max()
    divergence = torch.stack([(one.exp() * (one - other)).sum(-1).max() for one, other in pairs]).max()
    return float(difference), float(
        divergence.clamp(min=0)
    )  # torch's maximum is nan where one is, Python's may not be
