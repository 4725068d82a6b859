"""``merge``: a LoRA folded into its base, saved as a plain transformers folder that needs no peft."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, UserError
from tunesmith.models import load, probe
from tunesmith.models.locate import locate

LARGEST_DIFFERENCE = 1e-3
"""Of the largest logit: above this the merged model would be another one than the adapter on its base."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def merge(model: str | Path, out: str | Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Fold the adapter ``model`` into its base and write the result to the new folder ``out``.

    The sum is made in fp32 and saved in ``dtype`` (auto = the base's, float32, bfloat16, float16), with the adapter's
    tokenizer and chat template and the base's generation config. Tied embeddings stay tied unless the adapter itself
    trained them apart. Before anything is written, the logits of adapter and merged model are compared in fp32.

    Returns {"path", "base", "adapter", "dtype", "tied_embeddings", "parameters", "max_logit_difference",
    "max_logit_difference_saved"}: the largest difference in fp32, and that of the folder as saved (rounding to ``dtype``
    included). Raises UserError when ``out`` exists or there is nothing to merge, ModelError when the two models differ.
    """
    import torch

    folder = locate(model)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise UserError(f"{target} exists already; merge writes a new folder. Choose another --out, or remove it.")
    if folder.kind == "full" or folder.base is None:
        raise UserError(f"{folder.path} is a full model: there is no adapter in it, so there is nothing to merge")
    kept = load.checkpoint_dtype(folder.base) if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load.load_tokenizer(folder)
    attached = load.load_model(folder, dtype=torch.float32)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in probe.PROMPTS]
    before = [probe.last_logits(attached, ids) for ids in prompts]
    plain = load.merged(attached)
    scale = max(1.0, *(float(logits.abs().max()) for logits in before))
    difference = _largest(plain, prompts, before)
    if not difference <= LARGEST_DIFFERENCE * scale:
        raise ModelError(
            f"merging {folder.path} would change its answers: a logit differs by {difference:.3g} (of {scale:.3g}).\n"
            "  Nothing was written. Use the adapter as it is."
        )
    plain.to(kept)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        probe.write_probe(made, plain, tokenizer)
        reloaded = load.load_model(locate(made))
        saved = _largest(reloaded, prompts, before)
        made.chmod(0o755)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    ends = reloaded.get_input_embeddings(), reloaded.get_output_embeddings()
    return {
        "path": str(target),
        "base": str(folder.base),
        "adapter": str(folder.path),
        "dtype": str(kept).removeprefix("torch."),
        "tied_embeddings": ends[1] is not None and ends[0].weight is ends[1].weight,
        "parameters": reloaded.num_parameters(),
        "max_logit_difference": difference,
        "max_logit_difference_saved": saved,
    }


def _largest(model: Any, prompts: list[list[int]], before: list[Any]) -> float:
    return max(float((probe.last_logits(model, ids) - logits).abs().max()) for ids, logits in zip(prompts, before, strict=True))
