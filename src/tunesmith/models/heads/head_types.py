"""The heads of a network (lm, score, token, span): transformers' class for each, and the layers of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.models.network import attribute, base, is_causal, submodule, transformers_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

NEW_HEADS = ("score", "classifier", "qa_outputs")
"""Names that transformers gives the output layer of a task head."""
VALUE_HEAD = "value_head"
"""The name of the layer that a policy's values come from (``models.heads.value_head``)."""
TASK = {"lm": "CAUSAL_LM", "score": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""peft's ``task_type`` for each head."""
CLASSES = {
    "lm": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
"""transformers' class for each head."""

MIXES_PADDING = {"convbert", "fnet", "funnel", "canine", "nystromformer", "yoso", "mra"}
"""The ``model_type`` of encoders in which padding changes the hidden states of a row."""

KNOWN_LAYERS = {*NEW_HEADS, "pre_classifier", "pooler", "head", "dropout", "drop"}
"""Names of layers after the body that ``task_heads`` can run."""


def auto_class(kind: str) -> type[PreTrainedModel]:
    """Return transformers' class that loads a network with the head ``kind``."""
    if kind not in CLASSES:
        raise ModelError(f"no model class for the head {kind!r}: expected one of {', '.join(CLASSES)}")
    found = transformers_class(CLASSES[kind])
    assert found is not None, "all of them exist in every transformers that we support"
    return found


def kind_of(architecture: str) -> str:
    """Return the head of a transformers class: BertForTokenClassification -> token; ``lm`` for any other."""
    ends = {kind: name.removeprefix("AutoModel") for kind, name in CLASSES.items() if kind != "lm"}
    return next((kind for kind, end in ends.items() if architecture.endswith(end)), "lm")


def require_class(config: PretrainedConfig, kind: str) -> None:
    """Raise ModelError for an architecture that cannot have the head ``kind``."""
    from transformers.models.auto import modeling_auto as auto

    mapping = {
        "lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "score": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "span": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    }[kind]
    name, causal = config.model_type, is_causal(config)
    if attribute(config, "is_encoder_decoder"):
        raise ModelError(
            f"{name} is an encoder-decoder: its decoder reads what its encoder made of another text. tunesmith trains "
            "decoders and encoders alone, with any objective.\n"
            "  Take a decoder such as smollm2-135m to write text, or an encoder such as bert to classify, tag or answer."
        )
    if kind == "lm" and not causal:
        raise ModelError(
            f"{name} is an encoder, and this objective, which predicts the next token, needs a decoder.\n"
            "  Take a decoder such as smollm2-135m, or objective: classify, tag or qa."
        )
    convolves = (attribute(config, "conv_kernel_size") or 0) > 0
    if kind != "lm" and not causal and (name in MIXES_PADDING or convolves):
        raise ModelError(
            f"{name} mixes padding into the hidden states, so predictions would depend on the other rows of a "
            "batch.\n  Take another encoder, such as bert."
        )
    if type(config) not in mapping and CLASSES[kind] not in (attribute(config, "auto_map") or {}):
        needed = CLASSES[kind].removeprefix("AutoModel")
        raise ModelError(f"transformers has no {needed} for {name}. Take another model.")


def check_parts(model: PreTrainedModel) -> None:
    """Raise ModelError for a task head with layers that are not in ``KNOWN_LAYERS``."""
    if kind_of(type(model).__name__) == "lm":
        return
    body = model.base_model
    unknown = sorted({name for name, child in model.named_children() if child is not body} - KNOWN_LAYERS)
    if unknown or body is model or all(submodule(model, name) is None for name in NEW_HEADS):
        reason = f"has {' and '.join(unknown)}" if unknown else "has no known output layer"
        raise ModelError(
            f"the head of {type(model).__name__} {reason}: tunesmith cannot run such a head.\n  Take another model: "
            "bert, roberta, deberta-v2, electra, distilbert, mpnet, albert, modernbert, or a decoder."
        )


def parts(model: PreTrainedModel, kind: str) -> list[str]:
    """Return the names of the modules from the body's last hidden states to the logits."""
    inner = base(model)
    body = inner.base_model
    if body is inner:  # a body alone has no head
        return []
    children = inner.named_children()
    names = [name for name, child in children if child is not body and any(True for _ in child.parameters())]
    if kind == "score" and submodule(body, "pooler") is not None:
        names.append(f"{inner.base_model_prefix}.pooler")
    return names


def new_parts(model: PreTrainedModel, kind: str) -> list[str]:
    """Return :func:`parts` of a task head, which every adaptation trains and saves whole; none for ``lm``."""
    return [] if kind == "lm" else parts(model, kind)


def output_layer(inner: PreTrainedModel) -> nn.Module:
    """Return the layer that computes the logits of a task head."""
    return next(layer for name in NEW_HEADS if (layer := submodule(inner, name)) is not None)
