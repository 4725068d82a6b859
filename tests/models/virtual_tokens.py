"""Tiny models with virtual tokens, and the same models run by peft alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith import adaptations

KINDS = ("prefix", "prompt")
COUNT = 5
TOKENIZER = tiny_tokenizer("chatml", pad_is_eos=True)


def adapted(name: str, kind: str, noise: float = 0.3, changes: dict[str, Any] | None = None, **keys: Any) -> Any:
    """Return the adapted model; ``noise`` is added to the initial values."""
    module = adaptations.module(kind)
    adaptation = module.Adaptation(module.Config(**{"num_virtual_tokens": COUNT, **keys}))
    model = adaptation.apply(tiny_model(name, **(changes or {})), "lm", (), TOKENIZER).eval()
    shake(model, noise)
    return model


def shake(model: Any, noise: float, seed: int = 1) -> None:
    with torch.no_grad():
        weight = model.prompt_encoder["default"].embedding.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * noise)


def by_peft(name: str, model: Any) -> Any:
    """The same virtual tokens on a fresh base, with peft's own forward."""
    from peft import get_peft_model

    config = model.active_peft_config
    known = {key: value for key, value in config.to_dict().items() if key not in ("peft_type", "peft_version", "auto_mapping")}
    plain = get_peft_model(tiny_model(name), type(config)(**known)).eval()
    plain.prompt_encoder["default"].load_state_dict(model.prompt_encoder["default"].state_dict())
    return plain


def rows(*lengths: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Examples of random tokens, all supervised."""
    drawn = np.random.default_rng(seed)
    return [{"input_ids": drawn.integers(5, 300, n).astype(np.int32), "supervised": np.ones(n, np.bool_)} for n in lengths]


def ids_of(row: dict[str, np.ndarray]) -> torch.Tensor:
    """(1, tokens)"""
    return torch.from_numpy(row["input_ids"].astype(np.int64)[None])
