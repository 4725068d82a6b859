"""Heads beside the language model's: a score for each row, a label for each word, where an answer begins and ends.

The body runs once, packed or padded; its outputs are gathered at ``batch["positions"]`` and only these go through the model's own
pooler, dropout and output layer. So nothing depends on padding, and nothing is inferred from a token's identity: transformers'
own decoder classes look for the last token that is not the padding one, which is another token where padding and end are one.
Logits come in fp32, or in fp64 where the network is; a single one, such as a reward, is computed in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.models.heads import lm_head, noise
from tunesmith.models.heads.head_types import output_layer
from tunesmith.models.network import base, pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """(rows, labels) of a batch, from the outputs at ``batch["positions"]``: one of each row, or all that are to be averaged."""
    inner = base(model)
    mean = pooling(inner.config) == "mean"
    if lm_head.is_plain(model) and "segments" not in batch and not mean:
        with _one_number_in_full(inner):
            return _exact(inner(**_own_padding(inner, lm_head.inputs(model, batch))).logits)
    hidden = lm_head.outputs_at(model, batch)
    if mean:
        hidden = _means(hidden, batch["places"])
    with _one_by_one(model, [1] * len(hidden)):
        return _exact(_scores(inner, hidden, mean))


def token_logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """(places, labels) at ``batch["positions"]``."""
    if lm_head.is_plain(model):  # of the network itself: peft's forward for questions loses token types
        return _exact(base(model)(**lm_head.inputs(model, batch)).logits.flatten(0, 1)[batch["positions"]])
    inner, hidden = base(model), lm_head.outputs_at(model, batch)
    with _one_by_one(model, batch["places"]):
        return _exact(output_layer(inner)(_dropped(inner, hidden)))


def span_logits(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """How much speaks for an answer's beginning, and for its end, at each of ``batch["positions"]``: (places,) twice."""
    if lm_head.is_plain(model):
        found = base(model)(**lm_head.inputs(model, batch))
        places = batch["positions"]
        return _exact(found.start_logits.flatten()[places]), _exact(found.end_logits.flatten()[places])
    inner, hidden = base(model), lm_head.outputs_at(model, batch)
    with _one_by_one(model, batch["places"]):
        start, end = output_layer(inner)(_dropped(inner, hidden)).split(1, dim=-1)
    return _exact(start.squeeze(-1)), _exact(end.squeeze(-1))


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(lm_head.exact_dtype(logits))


def _scores(inner: Any, hidden: torch.Tensor, mean: bool) -> torch.Tensor:
    """The model's own way from a row's output (rows, width) to its logits."""
    layer = output_layer(inner)
    if _plain_type(layer).endswith("ClassificationHead"):  # roberta, electra: takes the first of a sequence
        return layer(hidden.unsqueeze(1))
    if hasattr(inner, "pre_classifier"):  # distilbert
        hidden = torch.relu(inner.pre_classifier(hidden))
    elif not mean and (pooler := _pooler(inner)) is not None:
        if _plain_type(pooler) == "Linear":  # albert
            hidden = inner.base_model.pooler_activation(pooler(hidden))
        else:
            hidden = pooler(hidden.unsqueeze(1))
    hidden = _dropped(inner, hidden)
    return _in_full(layer, hidden) if inner.config.num_labels == 1 else layer(hidden)


def _in_full(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``layer`` computed in fp32 whatever it is kept in: a number itself is wanted, and bf16 has 128 of them between
    1 and 2, so answers of different worth would get the same. Gradients reach its weights as ever."""
    exact = lm_head.exact_dtype(hidden)
    if exact == hidden.dtype:
        return layer(hidden)
    weights = {name: weight.to(exact) for name, weight in layer.named_parameters()}
    return torch.func.functional_call(layer, weights, (hidden.to(exact),))


@contextmanager
def _one_number_in_full(inner: Any) -> Iterator[None]:
    """The model's own forward with :func:`_in_full` where :func:`_scores` has it, so that every route gives the same rewards."""
    layer = output_layer(inner)
    if inner.config.num_labels != 1 or _plain_type(layer).endswith("ClassificationHead"):
        yield
        return

    def again(layer: Any, given: tuple[torch.Tensor], rounded: torch.Tensor) -> torch.Tensor:
        hook.remove()  # it stands on the layer that is called again
        return _in_full(layer, *given) if rounded.dtype != lm_head.exact_dtype(rounded) else rounded

    hook = layer.register_forward_hook(again)
    try:
        yield
    finally:
        hook.remove()


def _pooler(inner: Any) -> Any:
    """The body's, or deberta's, which stands beside the body; or None."""
    return next(
        (
            one
            for of in (inner, inner.base_model)
            if isinstance(one := getattr(of, "pooler", None), nn.Module)
        ),
        None,
    )


def _dropped(inner: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``hidden`` as the output layer gets it: through modernbert's head, and dropout."""
    for name in ("head", "drop", "dropout"):
        if isinstance(layer := getattr(inner, name, None), nn.Module):
            hidden = layer(hidden)
    return hidden


def _plain_type(layer: Any) -> str:
    """The class of a layer, or of what peft has put a trained copy beside."""
    return type(getattr(layer, "original_module", layer)).__name__


def _means(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(tokens, width) -> (rows, width): the mean over the tokens of each row, summed in fp32."""
    counts = torch.tensor(lengths, device=hidden.device)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), counts)
    exact = hidden.to(lm_head.exact_dtype(hidden))
    sums = exact.new_zeros(len(lengths), hidden.shape[1]).index_add(0, rows, exact)
    return (sums / counts[:, None]).to(hidden.dtype)


def _own_padding(inner: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """The batch padded with the model's own padding token, which is how the stock decoder classes find a row's end."""
    mask, pad = keywords.get("attention_mask"), inner.config.get_text_config().pad_token_id
    if mask is not None and pad is not None:
        keywords = {**keywords, "input_ids": keywords["input_ids"].masked_fill(mask == 0, pad)}
    return keywords


@contextmanager
def _one_by_one(model: PreTrainedModel, counts: Sequence[int]) -> Iterator[None]:
    """Dropout between here and the logits is drawn by row, for so many outputs of each."""
    drawn = noise.of(model)
    if drawn is None or not drawn.rows:
        yield
        return
    kept = drawn.lengths, drawn.packed, drawn.ahead
    drawn.lengths, drawn.packed, drawn.ahead = counts, True, 0
    try:
        yield
    finally:
        drawn.lengths, drawn.packed, drawn.ahead = kept
