"""The heads that a network can have (lm, score, token, span): transformers' class of each, and the layers that it consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.models.network import base, is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_HEADS = ("score", "classifier", "qa_outputs")
"""What transformers calls the output layer of a network that does not predict tokens."""
TASK = {"lm": "CAUSAL_LM", "score": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""What peft calls the job of each head."""
CLASSES = {
    "lm": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
"""transformers' class of each head."""

ENDS = {
    "score": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
"""How the classes of transformers that have these heads are called."""

MIXING = {"convbert", "fnet", "funnel", "canine", "nystromformer", "yoso", "mra"}
"""Encoders in which padding reaches the words beside it."""

KNOWN = {*NEW_HEADS, "pre_classifier", "pooler", "head", "dropout", "drop"}
"""Layers that may stand between a body and the logits."""


def auto_class(kind: str) -> Any:
    """transformers' class that loads a network with the head ``kind``."""
    import transformers

    if kind not in CLASSES:
        raise ModelError(f"no model class for the head {kind!r}: expected one of {', '.join(CLASSES)}")
    return getattr(transformers, CLASSES[kind])


def kind_of(architecture: str) -> str:
    """The head that a class of transformers has, by its name: BertForTokenClassification -> token; ``lm`` for any other."""
    return next((kind for kind, end in ENDS.items() if architecture.endswith(end)), "lm")


def require_class(config: Any, kind: str) -> None:
    """Raise ModelError for an architecture that transformers gives no such head."""
    from transformers.models.auto import modeling_auto as auto

    known = {
        "lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "score": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "span": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    }[kind]
    if kind == "lm" and not is_causal(config):
        raise ModelError(
            f"{config.model_type} is an encoder: each of its tokens sees those after it, so there is nothing to predict for this "
            "objective.\n  Take a decoder such as smollm2-135m, or objective: classify, tag or qa."
        )
    if kind != "lm" and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder with a decoder behind it: where a row would be read is not known here.\n"
            "  Take an encoder such as bert, or a decoder such as smollm2-135m."
        )
    mixes = config.model_type in MIXING or (getattr(config, "conv_kernel_size", None) or 0) > 0
    if kind != "lm" and mixes and not is_causal(config):
        raise ModelError(
            f"{config.model_type} reads padding beside a row (a convolution, or sums over all places), so what it says of a row "
            "would depend on the others of its batch.\n  Take another encoder, such as bert."
        )
    maps = getattr(config, "auto_map", None) or {}
    if type(config) not in known and CLASSES[kind] not in maps:
        raise ModelError(
            f"transformers has no {CLASSES[kind].removeprefix('AutoModel')} for {config.model_type}, which is needed here.\n"
            "  Take another model."
        )


def check_parts(model: PreTrainedModel) -> None:
    """Raise ModelError for a head that is made of other layers than those that are known here."""
    if kind_of(type(model).__name__) == "lm":
        return
    body = model.base_model
    strange = sorted({name for name, child in model.named_children() if child is not body} - KNOWN)
    if strange or body is model or output_layer(model) is None:
        found = f"has {' and '.join(strange)}" if strange else "has no output layer that is known"
        raise ModelError(
            f"the head of {type(model).__name__} {found}: what it does is not known here.\n"
            "  Take another model: bert, roberta, deberta-v2, electra, distilbert, mpnet, albert, modernbert, or a decoder."
        )


def parts(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of the modules between the body's last outputs and the logits; of a language model its output layer."""
    from torch import nn

    inner = base(model)
    body = inner.base_model
    if body is inner:  # a body alone has no head
        return []
    names = [
        name
        for name, child in inner.named_children()
        if child is not body and any(True for _ in child.parameters())
    ]
    if kind == "score" and isinstance(getattr(body, "pooler", None), nn.Module):
        names.append(f"{inner.base_model_prefix}.pooler")
    return names


def new_parts(model: PreTrainedModel, kind: str) -> list[str]:
    """:func:`parts` of a head that a body gets for a task: trained and saved whole whatever else is; of "lm" none."""
    return [] if kind == "lm" else parts(model, kind)


def output_layer(inner: Any) -> Any:
    """The layer that gives the logits of a head for a task, or None when it is not known."""
    from torch import nn

    return next(
        (layer for name in NEW_HEADS if isinstance(layer := getattr(inner, name, None), nn.Module)), None
    )
