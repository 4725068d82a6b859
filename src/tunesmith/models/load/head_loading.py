"""A head on a body that was trained without it: which tensors may be missing, which may be left over, and what is kept of it.

Some classes of transformers keep the body under another name than the checkpoint does (``LlamaForQuestionAnswering`` under
``transformer``, while every llama has it under ``model``): loaded plainly, all of it would be random numbers, with a warning.
Here the names are translated, and a tensor of the body that is missing is an error as everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RecipeError
from tunesmith.models.find import headers, record
from tunesmith.models.heads import head_types
from tunesmith.models.network import base, is_causal, pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.models.find.locate import Folder

OTHER_HEADS = (
    "lm_head", "cls", "predictions", "score", "classifier", "qa_outputs", "pre_classifier", "vocab_transform", "vocab_projector",
    "vocab_layer_norm", "discriminator_predictions", "generator_predictions", "generator_lm_head", "embed_out",
    "decoder", "head", "lm_predictions", "mask_predictions", "sop_classifier",
)  # fmt: skip
"""What checkpoints call the layers that stand on a body."""

CALLED = {
    "lm": "the head of a language model",
    "score": "a head for rows",
    "token": "a head for words",
    "span": "a head for answers",
}
"""The kinds of heads, in words."""

KEYS = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "tunesmith")
"""Entries of a config that belong to a head."""


def options(folder: Folder, config: Any, head: str, head_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a network with another head than the checkpoint may have."""
    if head_config is not None:
        apply(config, head_config)
    found: dict[str, Any] = {"config": config, "ignore_mismatched_sizes": True}
    if renamed := renamed_body(folder, config, head):
        found["key_mapping"] = renamed
    return found


def apply(config: Any, head_config: Mapping[str, Any]) -> None:
    """Write the entries of a head into a network's config."""
    for name, value in head_config.items():
        if name == "num_labels":
            continue  # follows from id2label
        if name == "id2label":
            value = {int(number): label for number, label in value.items()}
        setattr(config, name, value)
        if name == "pad_token_id" and config.get_text_config() is not config:
            config.get_text_config().pad_token_id = value


def inherit(config: Any, folder: Folder, adapter: str | None, head: str) -> None:
    """Write into ``config`` what an adapter that is kept (``adapter``: continue or merge) says of its head.

    Raises RecipeError for one that is to go on under the objective of another ``head``.
    """
    if adapter not in ("continue", "merge") or not record.read(folder.path):
        return  # of an adapter from elsewhere nothing is known
    saved = record.head(folder.path)
    kind = saved.get("type", "lm")
    if kind == head:
        apply(config, saved.get("config") or {})
    elif adapter == "continue":
        raise RecipeError(
            f"adapter: continue: this adapter was trained with {CALLED[kind]}, and the objective needs {CALLED[head]}.\n"
            "  Take its own objective, or start a new adapter with adapter: merge or adapter: new."
        )


def change(
    config: Any, folder: Folder, adapter: str | None, head: str, head_config: Mapping[str, Any]
) -> list[str]:
    """:func:`apply` where there may be a head already; what is to be said of that one, if it does not go on.

    Raises RecipeError for an adapter that is continued with other labels than it knows.
    """
    kept = adapter in ("continue", "merge")
    kind = (
        record.head(folder.path).get("type", "lm")
        if kept
        else head_types.kind_of((config.architectures or [""])[0])
    )
    said = []
    if is_other(kind, config, head, head_config):
        old, new = (
            ", ".join(map(str, list(names.values())[:10]))
            for names in (config.id2label, head_config["id2label"])
        )
        if adapter == "continue":
            raise RecipeError(
                f"adapter: continue: this adapter has a head for the labels {old}, and is to learn {new}.\n"
                "  Give objective.labels as it has them, or start a new adapter with adapter: merge or adapter: new."
            )
        was = f"for the labels {old}" if kind == head else f"another one ({CALLED[kind]})"
        said.append(f"the head of this model is {was}: a new one is drawn, for {new}")
    apply(config, head_config)
    return said


def is_other(kind: str, config: Any, head: str, head_config: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint that has a head (``kind``, with the labels of ``config``) has another than is wanted: of another kind,
    or with other labels, by name and order; what stands for a number or for an answer's ends has no names."""
    if kind == "lm" or head_config is None:
        return False
    old, new = config.id2label, {int(number): name for number, name in head_config["id2label"].items()}
    named = head != "span" and head_config.get("problem_type") != "regression"
    return kind != head or len(old) != len(new) or (named and old != new)


def draw(model: PreTrainedModel, head: str) -> None:
    """Give the layer that knows the labels its first numbers again: they were loaded, being as many as another head's."""
    from torch import nn

    for name in head_types.parts(model, head):
        for layer in model.get_submodule(name).modules():
            if isinstance(layer, nn.Linear) and layer.out_features == model.config.num_labels:
                marked: list[Any] = list(layer.parameters())
                for parameter in marked:
                    parameter._is_hf_initialized = (
                        False  # transformers draws no number of one that was loaded
                    )
                model._init_weights(layer)


def outlined(config: Any, head_config: Mapping[str, Any]) -> Any:
    """``config`` with what is known of a head before its labels are (its pooling); a copy, for the config says what was saved."""
    if not head_config:
        return config
    outline = copy.deepcopy(config)
    outline.tunesmith = {**(getattr(config, "tunesmith", None) or {}), **head_config["tunesmith"]}
    return outline


def renamed_body(folder: Folder, config: Any, head: str) -> dict[str, str]:
    """{pattern: prefix} where the checkpoint has the body under another name than the class does."""
    import torch

    with torch.device("meta"):
        network = head_types.auto_class(head).from_config(config)
    prefix = f"{network.base_model_prefix}."
    wanted = {name for name in network.state_dict() if name.startswith(prefix)}
    stored = set(headers.read_tensors(folder.network))
    if (
        wanted & stored or {prefix + name for name in stored} & wanted
    ):  # transformers finds a bare body by itself
        return {}
    for other in sorted({name.partition(".")[0] for name in stored}):
        if any(
            prefix + name.removeprefix(f"{other}.") in wanted
            for name in stored
            if name.startswith(f"{other}.")
        ):
            return {rf"^{other}\.": prefix}
    return {}


def keep_own_names(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Save the body under the name that the class has for it: transformers would write the names that it was read by, which the
    plain class does not find, and would then fill the body with random numbers."""
    if renamed := options.get("key_mapping"):
        model._weight_conversions = [
            one for one in model._weight_conversions if not set(one.source_patterns) & set(renamed)
        ]


def settle(
    model: PreTrainedModel,
    head: str,
    report: Mapping[str, Any],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> tuple[list[str], list[str]]:
    """(missing, unexpected) without what a new head explains. Tensors of the body are never explained."""
    ours = tuple(f"{name}." for name in head_types.parts(model, head))
    other_shape = [name for name, *_ in report["mismatched_keys"] if not name.startswith(ours)]
    left = [
        name
        for name in unexpected
        if name.partition(".")[0] not in OTHER_HEADS and ".pooler." not in f".{name}"
    ]
    return [name for name in missing if not name.startswith(ours)] + other_shape, left


def fitted(model: PreTrainedModel) -> Any:
    """``model`` without the pooler where the outputs of all tokens are averaged: nothing reads it then.

    Raises ModelError for a head that is not known.
    """
    head_types.check_parts(model)
    if pooling(model.config) == "mean":
        for owner in (model, model.base_model):
            if getattr(owner, "pooler", None) is not None:
                owner.pooler = None
    return model


def head_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """What an adapter's folder must say of its head, as JSON; None of a language model."""
    inner = base(model)
    kind = head_types.kind_of(type(inner).__name__)
    if kind == "lm":
        return None
    config = inner.config.to_dict()
    return {"type": kind, "config": {name: config[name] for name in KEYS if config.get(name) is not None}}


def answers(model: PreTrainedModel, ids: Any) -> Any:
    """What a model says of one row of ``ids`` (1, tokens): logits (tokens, n), or (1, labels) where a row has one answer."""
    import torch

    inner = base(model)
    kind = head_types.kind_of(type(inner).__name__)
    if kind == "score":
        tokens = ids.shape[1]
        mean = pooling(inner.config) == "mean"
        read = range(tokens) if mean else [tokens - 1 if is_causal(inner.config) else 0]
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "positions": torch.tensor(list(read), device=ids.device),
        }
        from tunesmith.models.heads import (
            task_heads,  # imports transformers, which load.quiet must come before
        )

        return task_heads.score_logits(model, {**batch, "places": [len(list(read))]})
    found = model(input_ids=ids)
    if kind == "span":
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
    return found.logits[0]
