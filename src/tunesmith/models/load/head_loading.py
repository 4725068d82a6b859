"""Load a task head onto a body that was saved without it: names, config entries, missing tensors.

Some classes of transformers name the body otherwise than checkpoints do: ``LlamaForQuestionAnswering`` calls
it ``transformer``, every llama checkpoint ``model``. transformers alone would fill that body with random
numbers and only warn. Here the names are translated, and a missing tensor of the body is an error.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import headers, record
from tunesmith.models.heads import head_types
from tunesmith.models.network import attribute, base, pooling, tunesmith_settings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith.models.find.locate import Folder

HEAD_MODULES = (
    "lm_head", "cls", "predictions", "score", "classifier", "qa_outputs", "pre_classifier", "vocab_transform",
    "vocab_projector", "vocab_layer_norm", "discriminator_predictions", "generator_predictions",
    "generator_lm_head", "embed_out", "decoder", "head", "lm_predictions", "mask_predictions",
    "sop_classifier",
)  # fmt: skip
"""Names of head layers in checkpoints."""

DESCRIPTIONS = {
    "lm": "a language-model head",
    "score": "a sequence-classification head",
    "token": "a token-classification head",
    "span": "a question-answering head",
}

CONFIG_KEYS = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "tunesmith")
"""Entries of a config that belong to a head."""


def head_of_config(config: PretrainedConfig) -> str:
    """Return the head (lm, score, token or span) of the checkpoint that ``config`` was saved with."""
    return head_types.kind_of((config.architectures or [""])[0])


def head_of_network(model: PreTrainedModel) -> str:
    """Return the head (lm, score, token or span) of a network in memory."""
    return head_types.kind_of(type(base(model)).__name__)


def apply_head_config(config: PretrainedConfig, head_config: JsonObject) -> None:
    """Write the entries of a head into a network's config, in place. ``id2label`` implies ``num_labels``."""
    values = {name: value for name, value in head_config.items() if name != "num_labels"}
    if "id2label" in values:
        values["id2label"] = {int(number): label for number, label in values["id2label"].items()}
    config.update(values)
    if "pad_token_id" in values:
        config.get_text_config().pad_token_id = values["pad_token_id"]


def inherit_head_config(config: PretrainedConfig, folder: Folder, adapter: str | None, head: str) -> None:
    """Write the head of a continued or merged adapter into ``config``. ``adapter``: the recipe's key.

    Raises RecipeError for an adapter that is continued with an objective of another ``head``.
    """
    if adapter not in ("continue", "merge") or not record.read(folder.path):
        return  # an adapter that tunesmith did not write has no record of its head
    saved = record.head(folder.path)
    kind = saved.get("type", "lm")
    if kind == head:
        apply_head_config(config, saved.get("config") or {})
    elif adapter == "continue":
        raise RecipeError(
            f"adapter: continue: this adapter was trained with {DESCRIPTIONS[kind]}, and the objective needs "
            f"{DESCRIPTIONS[head]}.\n"
            "  Use the adapter's objective, or start a new adapter with adapter: merge or adapter: new."
        )


def replace_head_config(
    config: PretrainedConfig, folder: Folder, adapter: str | None, head: str, head_config: JsonObject
) -> list[str]:
    """Write a head into ``config``, which may have one already. Returns a note when that one is not kept.

    Raises RecipeError for an adapter that is continued with other labels than its own.
    """
    kept = adapter in ("continue", "merge")
    kind = record.head(folder.path).get("type", "lm") if kept else head_of_config(config)
    notes = []
    if is_other_head(kind, config, head, head_config):
        labels = [list(one.values())[:10] for one in (config.id2label, head_config["id2label"])]
        old, new = (", ".join(map(str, names)) for names in labels)
        if adapter == "continue":
            raise RecipeError(
                f"adapter: continue: this adapter has a head for the labels {old}, and "
                f"the data have the labels {new}.\n"
                "  Set objective.labels to the adapter's, or use adapter: merge or adapter: new."
            )
        current = f"a head for the labels {old}" if kind == head else DESCRIPTIONS[kind]
        notes.append(f"this model has {current}: an untrained head for the labels {new} replaces it")
    apply_head_config(config, head_config)
    return notes


def is_other_head(kind: str, config: PretrainedConfig, head: str, head_config: JsonObject | None) -> bool:
    """Return whether a checkpoint's head differs from the wanted one: by type, or by labels and their order.

    ``kind``, ``config``: of the checkpoint. The labels of a regression or of a span have no names.
    """
    if kind == "lm" or head_config is None:
        return False
    old, new = config.id2label, {int(number): name for number, name in head_config["id2label"].items()}
    named = head != "span" and head_config.get("problem_type") != "regression"
    return kind != head or len(old) != len(new) or (named and old != new)


def reset_output_layer(model: PreTrainedModel, head: str) -> None:
    """Draw new initial weights for the layer with one output per label: it has another head's weights."""
    from torch import nn

    for name in head_types.parts(model, head):
        for layer in model.get_submodule(name).modules():
            if isinstance(layer, nn.Linear) and layer.out_features == model.config.num_labels:
                for parameter in layer.parameters():  # else transformers keeps what it loaded
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                model._init_weights(layer)


def with_head_settings(config: PretrainedConfig, head_config: JsonObject) -> PretrainedConfig:
    """Return a copy of ``config`` with the head settings that do not need the labels, such as pooling."""
    if not head_config:
        return config
    outline = copy.deepcopy(config)
    outline.tunesmith = {**tunesmith_settings(config), **head_config["tunesmith"]}
    return outline


def renamed_body(folder: Folder, config: PretrainedConfig, head: str) -> dict[str, str]:
    """Return {pattern: prefix} where the checkpoint names the body otherwise than the class, else {}."""
    import torch

    with torch.device("meta"):
        network = head_types.auto_class(head).from_config(config)
    prefix = f"{network.base_model_prefix}."
    wanted = {name for name in network.state_dict() if name.startswith(prefix)}
    stored = set(headers.read_tensors(folder.network))
    without_prefix = {prefix + name for name in stored}  # which transformers itself finds
    if wanted & stored or wanted & without_prefix:
        return {}
    for other in sorted({name.partition(".")[0] for name in stored}):
        names = [name.removeprefix(f"{other}.") for name in stored if name.startswith(f"{other}.")]
        if any(prefix + name in wanted for name in names):
            return {rf"^{other}\.": prefix}
    return {}


def save_under_class_names(model: PreTrainedModel, renamed: dict[str, str]) -> None:
    """Let ``save_pretrained`` write the body under the class's name, not under the name it was read by.

    ``renamed``: of :func:`renamed_body`. The class does not find a body under the other name.
    """
    if renamed:
        kept = [one for one in model._weight_conversions if not set(one.source_patterns) & set(renamed)]
        model._weight_conversions = kept


def unexplained_keys(
    model: PreTrainedModel, head: str, missing: list[str], unexpected: list[str], mismatched: list[str]
) -> tuple[list[str], list[str]]:
    """Return (missing, unexpected) without what another head explains. ``mismatched``: of another shape.

    A tensor of the body is never explained.
    """
    own = tuple(f"{name}." for name in head_types.parts(model, head))
    lacking = [name for name in (*missing, *mismatched) if not name.startswith(own)]
    body = [name for name in unexpected if name.partition(".")[0] not in HEAD_MODULES]
    return lacking, [name for name in body if ".pooler." not in f".{name}"]


def without_unused_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the pooler, in place, where the head reads a mean. Raises ModelError for an unknown head."""
    head_types.check_parts(model)
    if pooling(model.config) == "mean":
        for owner in (model, model.base_model):
            if attribute(owner, "pooler") is not None:
                owner.pooler = None
    return model


def head_record(model: PreTrainedModel) -> JsonObject | None:
    """Return the entry ``head`` of an adapter's record, None for a language model."""
    kind = head_of_network(model)
    if kind == "lm":
        return None
    config = base(model).config.to_dict()
    kept = {name: config[name] for name in CONFIG_KEYS if config.get(name) is not None}
    return {"type": kind, "config": kept}


def row_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return a row's logits, ``ids`` (1, tokens): (tokens, n), or (1, labels) of a head for whole rows."""
    import torch

    kind = head_of_network(model)
    if kind != "score" or pooling(base(model).config) != "mean":  # by the stock forward
        out = model(input_ids=ids)
        ends = [out.start_logits[0], out.end_logits[0]] if kind == "span" else None
        if ends:
            return torch.stack(ends, dim=-1)
        return out.logits if kind == "score" else out.logits[0]
    from tunesmith.models.heads import task_heads  # imports transformers, so load.quiet must run first

    positions = torch.arange(ids.shape[1], device=ids.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": positions}
    return task_heads.score_logits(model, {**batch, "places": [ids.shape[1]]})
