"""The language-model head and its loss, without ever holding the logits of a batch.

Only positions that have a target go through the vocabulary projection, in blocks; the gradient of the loss is made in the
forward pass while a block's logits are at hand, so backward is a multiplication by one number. (The idea is that of the fused
linear cross-entropies of Liger and TRL, here for any device, with no recomputation.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import nn

from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import fused_encoder, kernels, varlen
from tunesmith.models.heads import head_types, noise
from tunesmith.models.network import base, first_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 256  # rows of logits at a time: 25 MB in bf16 at 49 thousand words; matrix products are at full speed from here
_plain: WeakSet[nn.Module] = WeakSet()
_kept: WeakKeyDictionary[nn.Module, Callable[[dict[str, Any]], torch.Tensor | None]] = WeakKeyDictionary()


def use_plain_head(model: nn.Module, plain: bool) -> None:
    """Whether to compute ``model``'s loss from its own logits (chosen where the blocked head was shown not to be equal)."""
    if plain:
        _plain.add(base(model))
    else:
        _plain.discard(base(model))


def keep_outputs(model: nn.Module, find: Callable[[dict[str, Any]], torch.Tensor | None]) -> None:
    """From now on ``find(batch)`` stands for the outputs of ``model``'s body at ``batch["positions"]``; where it is None they are
    computed. It must not hold on to the model."""
    _kept[base(model)] = find


def takes_outputs(model: PreTrainedModel) -> bool:
    """Whether the loss is made of the body's outputs, and not of the model's own logits."""
    inner = base(model)
    last = inner.get_output_embeddings()
    return inner not in _plain and (last is None or _head(last)[0] is not None)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the loss is to be made of the model's own logits."""
    return base(model) in _plain


def own_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the trained parameters of the head that no other layer shares; empty when it is frozen or tied.

    Of a language model that is the output layer, of other heads all that stands after the body's outputs.
    """
    inner = base(model)
    kind = head_types.kind_of(type(inner).__name__)
    layers = [inner.get_submodule(name) for name in head_types.parts(model, kind)]
    if kind == "lm":
        layers = [inner.get_output_embeddings()]
    prefixes = tuple(
        name + "." for name, module in model.named_modules() if any(module is layer for layer in layers)
    )
    if not prefixes:
        return set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return {alias[0] for alias in names.values() if all(name.startswith(prefixes) for name in alias)}


def hidden_states(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """The body's last hidden states, (batch, seq, hidden)."""
    return base(model).base_model(**inputs(model, batch)).last_hidden_state


def outputs_at(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """The body's outputs at ``batch["positions"]`` (places,) of the flattened batch: (places, hidden), kept ones or new ones."""
    find = _kept.get(base(model))
    found = None if find is None else find(batch)
    if found is None and _few(model, batch):
        return _read_early(model, batch)
    if found is None:
        hidden = hidden_states(model, batch).flatten(0, 1)
        found = hidden[batch["positions"].to(hidden.device)]
    return found


def _few(model: PreTrainedModel, batch: dict[str, Any]) -> bool:
    """Whether the last layer can leave out most of what it would compute: few places are read, and it knows how."""
    few = "segments" in batch and 2 * len(batch["positions"]) <= batch["input_ids"].numel()
    return few and not virtual_tokens.count(model) and fused_encoder.reads_early(base(model).base_model)


def _read_early(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """:func:`outputs_at` by an encoder whose last layer is told which places are read."""
    drawn = noise.of(model)
    if drawn is not None:
        drawn.read = batch["positions"]
    try:
        out = base(model).base_model(**inputs(model, batch), read=batch["positions"]).last_hidden_state
    finally:
        if drawn is not None:
            drawn.read = None
    return out[0]


def inputs(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``model``'s forward for a packed (``segments``) or padded (``attention_mask``) batch.

    What its packed attention wants to know of the segments is made here: once for a batch, not once for a layer.
    """
    names = ["input_ids", "position_ids", "attention_mask", "token_type_ids"]
    keywords: dict[str, Any] = {"use_cache": False}
    behind = batch.get("behind")
    if behind is not None and max(behind) < 0:
        behind = None  # nobody shares anything
    if base(model).config._attn_implementation == varlen.NAME and "segments" in batch:
        keywords |= varlen.boundaries(batch["segments"], batch["input_ids"].device, behind)
    else:
        names.append("segments")
        keywords |= {} if behind is None else {"behind": behind}
    given = {name: batch[name] for name in names if batch.get(name) is not None}
    if "position_ids" in given and (first := first_position(base(model).config)):
        given["position_ids"] = given["position_ids"] + first
    return given | keywords


def lm_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of ``batch["labels"]`` (targets,), a scalar.

    ``batch["positions"]`` (targets,) are the places, in the flattened batch, that predict them.
    """
    given = blocked(model, batch)
    return plain_losses(model, batch).sum() if given is None else BlockedCrossEntropy.apply(*given)


def blocked(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of ``BlockedCrossEntropy``, when the head is one product."""
    inner = base(model)
    head, rows, new = _head(inner.get_output_embeddings())
    if inner in _plain or head is None:
        return None
    here = head.weight.device  # with a device_map the last layer and the head need not be where the batch is
    hidden = outputs_at(model, batch).to(here)
    return hidden, head.weight, head.bias, batch["labels"].to(here), rows, new


def _head(layer: Any) -> tuple[nn.Linear | None, torch.Tensor | None, torch.Tensor | None]:
    """(linear layer, rows, what stands in them): the head as one product, None when it is something else.

    peft keeps the trained rows of a vocabulary beside a frozen layer; of a bias it knows nothing.
    """
    trained = getattr(layer, "token_adapter", None)
    if trained is None:
        return (layer if type(layer) is nn.Linear else None), None, None
    inner, names = trained.base_layer, trained.active_adapters
    if type(inner) is not nn.Linear or inner.bias is not None or len(names) != 1:
        return None, None, None
    if trained.merged or trained.disable_adapters:
        return inner, None, None
    new = trained.trainable_tokens_delta[names[0]]
    return inner, torch.tensor(trained.token_indices[names[0]], device=new.device), new


@torch.no_grad()
def row_losses(model: PreTrainedModel, batch: dict[str, Any]) -> list[tuple[float, int]]:
    """(sum of the negative log-likelihoods, targets) of each row of ``batch`` that has a target; by the way of ``lm_loss``."""
    given = blocked(model, batch)
    if given is None:
        losses = plain_losses(model, batch)
    else:
        hidden, weight, bias, labels, rows, new = given
        weight = with_new(weight, rows, new)
        losses = torch.zeros(len(hidden), dtype=exact_dtype(hidden), device=hidden.device)
        for start in range(0, len(hidden), BLOCK):
            part = slice(start, start + BLOCK)
            loss_and_gradient(nn.functional.linear(hidden[part], weight, bias), labels[part], losses[part])
    positions = batch["positions"].cpu().numpy()
    if (
        "segments" in batch
    ):  # a target is never the first token of its row, so the place that predicts it is in the row too
        row_of = np.searchsorted(np.cumsum(batch["segments"]), positions, side="right")
    else:
        row_of = positions // batch["input_ids"].shape[1]
    counts = np.bincount(row_of)
    sums = np.bincount(
        row_of, weights=losses.cpu().double().numpy()
    )  # in order and in fp64: the same every time
    return [(float(total), int(count)) for total, count in zip(sums, counts) if count]


def plain_losses(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of each target (targets,), from the model's own logits."""
    logits = model(**inputs(model, batch)).logits.flatten(0, 1)[batch["positions"]]
    return nn.functional.cross_entropy(logits.to(exact_dtype(logits)), batch["labels"], reduction="none")


def exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What a loss is computed in: fp32, or fp64 where the network is."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class BlockedCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(h_i W^T + b)[label_i]. ``hidden`` (targets, width), ``weight`` (vocabulary, width).

    ``new`` (n, width) stands in the place of the ``rows`` (n,) of W, and gets a gradient of its own: n rows, not the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        rows: torch.Tensor | None = None,
        new: torch.Tensor | None = None,
    ) -> torch.Tensor:
        targets = hidden.shape[0]
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        weight = with_new(weight, rows, new)
        losses = torch.zeros(max(targets, 1), dtype=exact_dtype(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = sum_like(weight) if want_weight else None
        grad_bias = sum_like(bias) if want_bias and bias is not None else None
        grad_new = sum_like(new) if new is not None and ctx.needs_input_grad[5] else None
        for start in range(0, targets, BLOCK):
            block = hidden[start : start + BLOCK]
            block_labels = labels[start : start + BLOCK]
            logits = torch.nn.functional.linear(block, weight, bias)
            gradient = loss_and_gradient(logits, block_labels, losses[start : start + BLOCK])
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + BLOCK])
            if grad_weight is not None:
                add_product(grad_weight, gradient.t(), block)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
            if grad_new is not None:
                add_product(grad_new, gradient[:, rows].t(), block)
        if grad_weight is not None and rows is not None:
            grad_weight[rows] = 0  # others stood in their place
        ctx.gradients = (grad_hidden, grad_weight, grad_bias, grad_new)
        ctx.dtypes = tuple(None if one is None else one.dtype for one in (hidden, weight, bias, new))
        return losses.sum(
            dtype=torch.float32 if hidden.device.type == "mps" else torch.float64
        )  # thousands of terms

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, new = (
            None if one is None else _times(one, grad, dtype)
            for one, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = (None, None, None, None)
        return hidden, weight, bias, None, None, new


def with_new(weight: torch.Tensor, rows: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor:
    """``weight`` (vocabulary, width) with ``new`` (n, width) in the place of its ``rows`` (n,), if there are any."""
    return weight if rows is None or new is None else weight.index_copy(0, rows, new.to(weight.dtype))


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right; ``total`` may be in a wider format."""
    if total.dtype is left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def sum_like(weight: torch.Tensor) -> torch.Tensor:
    """Zeros to sum a gradient in. It is not yet divided by anything, so in fp16 it could pass that format's 65504."""
    return torch.zeros_like(weight, dtype=torch.float32 if weight.dtype is torch.float16 else weight.dtype)


def _times(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient`` times the number ``factor``, in ``dtype``. A loss scale of 65536 is itself above what fp16 holds."""
    if dtype is torch.float16:
        return gradient.float().mul_(factor.float()).to(dtype)
    return gradient.mul_(factor.to(gradient.dtype)).to(dtype)


def loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Fill ``losses`` (rows,) and return softmax(logits) - onehot in the logits' dtype; ``logits`` may be overwritten."""
    if kernels.available(logits):
        kernels.call("cross_entropy", logits.dtype, logits, labels, losses, logits.shape[0], logits.shape[1])
        return logits
    exact = logits.to(exact_dtype(logits))
    normaliser = torch.logsumexp(exact, dim=-1)
    losses.copy_(normaliser - exact.gather(1, labels[:, None])[:, 0])
    gradient = exact.sub_(normaliser[:, None]).exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient.to(logits.dtype)
