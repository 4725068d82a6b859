"""Facts about networks, layers and configs of transformers, peft and bitsandbytes.

Only this module asks such an object for an attribute that it may lack. It imports no part of ``models``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""Exceptions that the forward of a network raises for arguments that it does not accept."""


def attribute(owner: object, *names: str) -> Any:
    """Return the first of the attributes ``names`` that ``owner`` has, or None."""
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)


def has_attributes(owner: object, *names: str) -> bool:
    """Return whether ``owner`` has every one of the attributes ``names``."""
    return all(hasattr(owner, name) for name in names)


def is_peft(model: PreTrainedModel) -> bool:
    """Return whether ``model`` is a peft wrapper around a transformers model."""
    return has_attributes(model, "peft_config", "get_base_model")


def base(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper, or ``model`` itself."""
    return model.get_base_model() if is_peft(model) else model


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers in ``model``: those with an adapter, trained copies, and trained rows."""
    names = ("active_adapters", "disable_adapters", "adapter_layer_names")
    return [module for module in model.modules() if has_attributes(module, *names)]


def adapter_state(model: nn.Module) -> str:
    """Return which adapters of peft's layers take part in the forward pass of ``model``; "" without any."""
    layers = adapter_layers(model)
    return " ".join(sorted({f"{layer.active_adapters} {layer.disable_adapters}" for layer in layers}))


def submodule(module: nn.Module, name: str) -> Any:
    """Return the child module ``name``; None when ``module`` has no module of that name."""
    from torch import nn

    child = attribute(module, name)
    return child if isinstance(child, nn.Module) else None


def without_adapter(layer: nn.Module) -> Any:
    """Return the layer of the base model inside peft's wrappers: an adapter's, and that of a trained copy."""
    for wrapped in ("base_layer", "original_module"):
        inner = submodule(layer, wrapped)
        layer = layer if inner is None else inner
    return layer


def trained_rows(layer: nn.Module) -> TrainableTokensLayer | None:
    """Return peft's trained rows of an embedding or output layer (``trainable_token_indices``), or None."""
    return attribute(layer, "token_adapter")


def quant_state(weight: object) -> QuantState | None:
    """Return the scales of a 4-bit weight of bitsandbytes; None for any other weight."""
    return attribute(weight, "quant_state")


def transformers_class(name: str) -> type[PreTrainedModel] | None:
    """Return the class ``name`` of transformers, or None."""
    import transformers

    return attribute(transformers, name)


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether the network of ``config`` is a decoder: a token attends only to those before it."""
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    if attribute(config, "is_decoder"):
        return True
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING:
        return False
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING or kind not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    return issubclass(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind], GenericForSequenceClassification)


def tunesmith_settings(config: PretrainedConfig) -> JsonObject:
    """Return the entries that tunesmith added to a saved config (objective, pooling, ...), else {}."""
    return attribute(config, "tunesmith") or {}


def pooling(config: PretrainedConfig) -> str | None:
    """Return ``mean`` where the head reads the mean over all tokens, None where it reads one token."""
    modernbert = attribute(config, "classifier_pooling")
    return "mean" if "mean" in (tunesmith_settings(config).get("pooling"), modernbert) else None


def first_position(model: PreTrainedModel) -> int:
    """Return the position id that a row's first token should have, judged by the layers.

    In roberta's family it follows the padding index of the embeddings; elsewhere it is 0. ``train.row_check``
    checks it."""
    for module in model.modules():
        padding = attribute(module, "padding_idx")
        if isinstance(padding, int) and submodule(module, "position_embeddings") is not None:
            return padding + 1
    return 0


def padding_ids(model: PreTrainedModel) -> set[int]:
    """Return the token ids that ``model`` may treat as padding."""
    found = {attribute(module, "padding_idx") for module in model.modules()}
    found.add(attribute(base(model).config, "pad_token_id"))
    return {int(number) for number in found if number is not None}


def context_window(config: PretrainedConfig) -> int | None:
    """Return the most tokens that a row may have, or None when the config names no limit."""
    limit = attribute(config.get_text_config(), "max_position_embeddings")
    return None if limit is not None and limit < 1 else limit  # xlnet's config has -1


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the tokens that each token attends to, or None when it attends to all before it."""
    return attribute(config.get_text_config(), "sliding_window")


def peft_type(config: object) -> str:
    """Return the type in a peft config (``LORA``, ``PREFIX_TUNING``, ...), which is an enum or text."""
    kind = attribute(config, "peft_type")
    return str(attribute(kind, "value") or kind)
