"""Facts about a network in memory or its config; every part of ``models`` may ask them, and this module imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIFTED = (
    "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "xmod", "data2vec-text", "longformer",
    "ibert", "mpnet",
)  # fmt: skip
"""Kinds of networks whose first token does not stand at position 0."""


def base(model: PreTrainedModel) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def is_causal(config: Any) -> bool:
    """Whether the network of ``config`` is a decoder, whose tokens see only what stands before them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return bool(getattr(config, "is_decoder", False)) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def pooling(config: Any) -> str | None:
    """``mean`` where the outputs of all tokens are averaged (ours, or modernbert's own), None where one stands for its row."""
    ours = (getattr(config, "tunesmith", None) or {}).get("pooling")
    return "mean" if "mean" in (ours, getattr(config, "classifier_pooling", None)) else None


def first_position(config: Any) -> int:
    """The position of a row's first token: in roberta's family the one after that of padding."""
    return int(config.pad_token_id) + 1 if config.model_type in SHIFTED else 0
