"""Task heads: a score for each row, a label for each word, the start and end of an answer.

The body runs once, packed or padded. Its hidden states at ``batch["positions"]`` alone go through the model's
pooler, dropout and output layer, so nothing depends on padding. (transformers' decoder classes read the last
token that is not the padding token: the wrong one where padding and end are the same token.) Logits are in
fp32 or fp64; a single logit for a row, such as a reward, is also computed in that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunesmith.models.heads import lm_head, noise
from tunesmith.models.heads.head_types import output_layer
from tunesmith.models.heads.lm_head import Batch
from tunesmith.models.network import base, pooling, submodule, without_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return (rows, labels) from the hidden states at ``batch["positions"]``: one of each row, or all."""
    inner = base(model)
    mean = pooling(inner.config) == "mean"
    if lm_head.is_plain(model) and "segments" not in batch and not mean:
        with _exact_single_logit(inner):
            return _exact(inner(**_with_pad_tokens(inner, lm_head.inputs(model, batch))).logits)
    hidden = lm_head.outputs_at(model, batch)
    if mean:
        hidden = _means(hidden, batch["places"])
    with noise.override(model, lengths=[1] * len(hidden), packed=True, ahead=0):
        return _exact(_row_logits(inner, hidden, mean))


def token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return (positions, labels) at ``batch["positions"]``."""
    inner = base(model)  # also for its own logits: peft's forward of question answering drops token types
    if lm_head.is_plain(model):
        return _exact(inner(**lm_head.inputs(model, batch)).logits.flatten(0, 1)[batch["positions"]])
    hidden = lm_head.outputs_at(model, batch)
    with noise.override(model, lengths=batch["places"], packed=True, ahead=0):
        return _exact(output_layer(inner)(_before_output_layer(inner, hidden)))


def span_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of an answer's start and end at ``batch["positions"]``: (positions,) twice."""
    if not lm_head.is_plain(model):
        start, end = token_logits(model, batch).split(1, dim=-1)
        return start.squeeze(-1), end.squeeze(-1)
    out = base(model)(**lm_head.inputs(model, batch))
    start, end = (logits.flatten()[batch["positions"]] for logits in (out.start_logits, out.end_logits))
    return _exact(start), _exact(end)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(lm_head.exact_dtype(logits))


def _row_logits(inner: PreTrainedModel, hidden: Tensor, mean: bool) -> Tensor:
    """Return the logits of ``hidden`` (rows, width), by the layers of the model's own forward."""
    layer = output_layer(inner)
    if _is_classification_head(layer):
        return layer(hidden.unsqueeze(1))
    if (pre_classifier := submodule(inner, "pre_classifier")) is not None:  # distilbert
        hidden = torch.relu(pre_classifier(hidden))
    elif not mean and (pooler := submodule(inner, "pooler") or submodule(inner.base_model, "pooler")):
        if type(without_adapter(pooler)) is nn.Linear:  # albert
            hidden = inner.base_model.pooler_activation(pooler(hidden))
        else:
            hidden = pooler(hidden.unsqueeze(1))
    hidden = _before_output_layer(inner, hidden)
    return _apply_exact(layer, hidden) if inner.config.num_labels == 1 else layer(hidden)


def _apply_exact(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return ``layer(hidden)`` computed in fp32 whatever its dtype; gradients reach its weights as usual.

    bf16 has 128 numbers between 1 and 2, so it would give answers of different quality the same reward.
    """
    exact = lm_head.exact_dtype(hidden)
    if exact == hidden.dtype:
        return layer(hidden)
    weights = {name: weight.to(exact) for name, weight in layer.named_parameters()}
    return torch.func.functional_call(layer, weights, (hidden.to(exact),))


@contextmanager
def _exact_single_logit(inner: PreTrainedModel) -> Iterator[None]:
    """Let the model's own forward use :func:`_apply_exact`, as :func:`_row_logits` does."""
    layer = output_layer(inner)
    if inner.config.num_labels != 1 or _is_classification_head(layer):
        yield
        return

    def recompute(layer: nn.Module, given: tuple[Tensor], rounded: Tensor) -> Tensor:
        hook.remove()  # else the call below would run it again
        return _apply_exact(layer, *given) if rounded.dtype != lm_head.exact_dtype(rounded) else rounded

    hook = layer.register_forward_hook(recompute)
    try:
        yield
    finally:
        hook.remove()


def _is_classification_head(layer: nn.Module) -> bool:
    """Return whether the output layer is a network that reads the first token of a sequence (roberta, electra)."""
    return type(without_adapter(layer)).__name__.endswith("ClassificationHead")


def _before_output_layer(inner: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return ``hidden`` as the output layer takes it: after modernbert's head, and dropout."""
    for name in ("head", "drop", "dropout"):
        if (layer := submodule(inner, name)) is not None:
            hidden = layer(hidden)
    return hidden


def _means(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """(tokens, width) -> (rows, width): the mean over the tokens of each row, summed in fp32."""
    counts = torch.tensor(lengths, device=hidden.device)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), counts)
    exact = _exact(hidden)
    sums = exact.new_zeros(len(lengths), hidden.shape[1]).index_add(0, rows, exact)
    return (sums / counts[:, None]).to(hidden.dtype)


def _with_pad_tokens(inner: PreTrainedModel, keywords: Batch) -> Batch:
    """Pad with the model's padding token, by which transformers' decoder classes find the end of a row."""
    mask, pad = keywords.get("attention_mask"), inner.config.get_text_config().pad_token_id
    if mask is not None and pad is not None:
        keywords = {**keywords, "input_ids": keywords["input_ids"].masked_fill(mask == 0, pad)}
    return keywords
