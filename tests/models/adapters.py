"""Adapters on tiny models with random values, saved as a run saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import save_tiny
from tunesmith.models.load.load import Folder, load_model, load_tokenizer
from tunesmith.models.load.probe import write_probe


def save_adapter(
    base: Path, folder: Path, seed: int = 1, config: Any = None, load_kwargs: dict[str, Any] | None = None, **lora: Any
) -> Any:
    """Save a peft model with random trained values, its tokenizer and probe.

    ``config``: peft's; default a LoRA of all layers. ``load_kwargs``: of ``load_model``, such as those that quantise the base.
    """
    from peft import LoraConfig, get_peft_model

    source = Folder(base.resolve(), "full")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(load_model(source, **(load_kwargs or {})), config or LoraConfig(**options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tokenizer = load_tokenizer(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_probe(folder, model, tokenizer)
    return model


def base_and_adapter(tmp: Path, name: str = "llama", **lora: Any) -> tuple[Path, Path]:
    base = save_tiny(name, tmp / "base")
    save_adapter(base, tmp / "adapter", **lora)
    return base, tmp / "adapter"
