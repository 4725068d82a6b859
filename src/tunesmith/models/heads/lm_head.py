"""The language-model head and its loss. The logits of a whole batch never exist at once.

Only positions that have a target go through the vocabulary projection, in blocks. The gradient of the loss is
computed in the forward pass, while a block's logits exist, so backward multiplies it by one number; in fp32 the weight's own
gradient is computed later, where the gradient by the logits is smaller. (The idea
is that of the fused linear cross-entropies of Liger and TRL, here for any device, without recomputation.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import kernels, last_layer, varlen, weight_gradients
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.heads import head_types, noise
from tunesmith.models.network import base, first_position, trained_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
"""A collated batch: tensors, and per-row values on the host such as ``segments``."""

BLOCK = 512
"""Rows of logits at a time in fp32: 100 MB at a vocabulary of 49 thousand. Every block arranges the weights for the processor
anew, so 256 rows take 15% longer with AVX2. Formats of 16 bits have half as many rows."""

SLICE = 4096
"""Words of the vocabulary at a time in fp32: with AVX2 one product for all of them takes a sixth longer."""

_own_logits: WeakSet[nn.Module] = WeakSet()
_first_position: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()
_cached: WeakKeyDictionary[nn.Module, Callable[[Batch], Tensor | None]] = WeakKeyDictionary()


def use_plain_head(model: PreTrainedModel, plain: bool) -> None:
    """Compute the loss of ``model`` from its own logits; with ``plain`` False by the blocked head again."""
    if plain:
        _own_logits.add(base(model))
    else:
        _own_logits.discard(base(model))


def number_from(model: PreTrainedModel, first: int | None) -> None:
    """Set the position id of a row's first token to ``first``; None = ``model`` computes position ids
    itself."""
    _first_position[base(model)] = first


def keep_outputs(model: PreTrainedModel, find: Callable[[Batch], Tensor | None]) -> None:
    """Take the body's hidden states at ``batch["positions"]`` from ``find(batch)``, unless that is None.

    ``find`` must hold no reference to the model.
    """
    _cached[base(model)] = find


def takes_outputs(model: PreTrainedModel) -> bool:
    """Return whether the loss is computed from the body's hidden states, not from the model's own logits."""
    inner = base(model)
    last = inner.get_output_embeddings()
    return inner not in _own_logits and (last is None or _linear_head(last)[0] is not None)


def is_plain(model: PreTrainedModel) -> bool:
    """Return whether the loss is computed from the model's own logits."""
    return base(model) in _own_logits


def own_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of the head's trained parameters that no other layer shares (none if frozen or tied).

    The head is the output layer of a language model, or every layer after the body of a task model.
    """
    inner = base(model)
    kind = head_types.kind_of(type(inner).__name__)
    layers = [inner.get_submodule(name) for name in head_types.parts(model, kind)]
    if kind == "lm":
        layers = [inner.get_output_embeddings()]
    modules = model.named_modules()
    prefixes = tuple(f"{name}." for name, module in modules if any(module is layer for layer in layers))
    if not prefixes:
        return set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return {alias[0] for alias in names.values() if all(name.startswith(prefixes) for name in alias)}


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the body's last hidden states, (batch, seq, hidden)."""
    return base(model).base_model(**inputs(model, batch)).last_hidden_state


def outputs_at(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the body's hidden states at ``batch["positions"]`` (n,) of the flattened batch, (n, hidden)."""
    find = _cached.get(base(model))
    cached = None if find is None else find(batch)
    if cached is not None:
        return cached
    read, body = batch["positions"], base(model).base_model
    few = "segments" in batch and len(read) <= last_layer.most_read(body) * batch["input_ids"].numel()
    if few and not virtual_tokens.count(model):
        with noise.override(model, read=read):  # the last layer computes these positions alone
            return body(**inputs(model, batch), read=read).last_hidden_state[0]
    hidden = hidden_states(model, batch).flatten(0, 1)
    return hidden[read.to(hidden.device)]


def inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    """Return the keywords of a forward for a packed (``segments``) or padded (``attention_mask``) batch.

    The arguments of packed attention are made here: once for a batch, not once for a layer.
    """
    names = ["input_ids", "position_ids", "attention_mask", "token_type_ids"]
    keywords: Batch = {"use_cache": False}
    behind = batch.get("behind")
    if behind is not None and max(behind) < 0:
        behind = None  # no two answers share a prompt
    if base(model).config._attn_implementation == varlen.NAME and "segments" in batch:
        keywords |= varlen.boundaries(batch["segments"], batch["input_ids"].device, behind)
    else:
        names.append("segments")
        keywords |= {} if behind is None else {"behind": behind}
    given = {name: batch[name] for name in names if batch.get(name) is not None}
    if "position_ids" in given:
        inner = base(model)
        if inner not in _first_position:  # no parity check yet
            number_from(inner, first_position(inner))
        first = _first_position[inner]
        if first is None:
            del given["position_ids"]
        elif first:
            given["position_ids"] = given["position_ids"] + first
    return given | keywords


def lm_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the sum of the negative log-likelihoods of ``batch["labels"]`` (targets,), a scalar.

    ``batch["positions"]`` (targets,) are the positions of the flattened batch that predict them.
    """
    given = blocked(model, batch)
    return plain_losses(model, batch).sum() if given is None else BlockedCrossEntropy.apply(*given)


BlockedArguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


def blocked(model: PreTrainedModel, batch: Batch) -> BlockedArguments | None:
    """Return the arguments of ``BlockedCrossEntropy``, or None when the head is not one matrix product."""
    inner = base(model)
    head, rows, new = _linear_head(inner.get_output_embeddings())
    if inner in _own_logits or head is None:
        return None
    here = head.weight.device  # with a device_map not always that of the batch, or of the last layer
    hidden = outputs_at(model, batch).to(here)
    return hidden, head.weight, head.bias, batch["labels"].to(here), rows, new


def _linear_head(layer: nn.Module) -> tuple[nn.Linear | None, Tensor | None, Tensor | None]:
    """Return (linear layer, rows, new values of these rows); None for a head that is not one product.

    peft keeps trained rows of the vocabulary next to a frozen layer, and supports no bias there.
    """
    trained = trained_rows(layer)
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
def row_losses(model: PreTrainedModel, batch: Batch) -> list[tuple[float, int]]:
    """Return (sum of negative log-likelihoods, targets) of each row that has a target, as in ``lm_loss``."""
    given = blocked(model, batch)
    if given is None:
        losses = plain_losses(model, batch)
    else:
        losses, _ = target_losses(given)
    positions = batch["positions"].cpu().numpy()
    if "segments" in batch:  # no target is the first token of its row, so the row also holds its position
        row_of = np.searchsorted(np.cumsum(batch["segments"]), positions, side="right")
    else:
        row_of = positions // batch["input_ids"].shape[1]
    counts = np.bincount(row_of)
    sums = np.bincount(row_of, weights=losses.cpu().double().numpy())  # in order and in fp64: reproducible
    return [(float(total), int(count)) for total, count in zip(sums, counts) if count]


def plain_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the loss of each target, (targets,), from the model's own logits."""
    logits, labels, _ = plain_logits(model, batch)
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def plain_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the model's own logits at the targets, the targets, and the hidden states that enter its head there.

    The hidden states are None if the model does not say which layer its head is."""
    kept: list[Tensor] = []
    head = base(model).get_output_embeddings()
    hook = head and head.register_forward_pre_hook(lambda layer, given: kept.append(given[0]))
    try:
        logits = model(**inputs(model, batch)).logits.flatten(0, 1)[batch["positions"]]
    finally:
        if hook:
            hook.remove()
    hidden = kept[0].flatten(0, 1)[batch["positions"]] if kept else None
    return logits.to(exact_dtype(logits)), batch["labels"], hidden


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which losses are computed: fp32, or fp64 where the network is in fp64."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


LossGradients = tuple[
    tuple[Tensor | None, ...], tuple[torch.dtype | None, ...], tuple[Tensor, Tensor, Tensor | None]
]
"""Gradients by the arguments and their formats; for the gradient by the weight: weight, ``hidden``, gradient by the logits."""


class BlockedCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(h_i W^T + b)[label_i]. ``hidden`` (targets, width), ``weight`` (vocabulary, width).

    ``new`` (n, width) replaces the ``rows`` (n,) of W and has its own gradient: n rows, not the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Context[LossGradients],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None = None,
        new: Tensor | None = None,
    ) -> Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        given, weight = weight, with_new(weight, rows, new)
        losses = torch.zeros(max(len(hidden), 1), dtype=exact_dtype(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # its gradient is computed at once, or later, from the gradient by the logits, where that is smaller
        later = want_weight and rows is None and _is_kept(hidden, weight)
        grad_weight = sum_like(weight) if want_weight and not later else None
        grad_logits = None
        grad_bias = sum_like(bias) if want_bias and bias is not None else None
        grad_new = sum_like(new) if new is not None and ctx.needs_input_grad[5] else None
        for here, gradient in gradient_blocks(hidden, weight, bias, labels, losses):
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[here])
            if grad_weight is not None:
                add_product(grad_weight, gradient.t(), hidden[here])
            if later:
                grad_logits = gradient
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
            if grad_new is not None:
                add_product(grad_new, gradient[:, rows].t(), hidden[here])
        if grad_weight is not None and rows is not None:
            grad_weight[rows] = 0  # ``new`` replaced them
        dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias, new))
        ctx.kept = (grad_hidden, grad_weight, grad_bias, grad_new), dtypes, (given, hidden, grad_logits)
        # fp64, since a sum may have thousands of terms; mps has none
        return losses.sum(dtype=torch.float32 if hidden.device.type == "mps" else torch.float64)

    @staticmethod
    def backward(ctx: Context[LossGradients], grad: Tensor) -> Gradients:
        gradients, dtypes, (given, read, grad_logits) = ctx.kept
        hidden, weight, bias, new = (
            None if x is None or dtype is None else _times(x, grad, dtype)
            for x, dtype in zip(gradients, dtypes, strict=True)
        )
        if grad_logits is not None:
            [weight] = weight_gradients.of_product(grad_logits, read * grad.to(read.dtype), [given], [True])
        ctx.kept = (), (), (given, read, None)
        return hidden, weight, bias, None, None, new


def _is_kept(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether the gradient by the logits is kept for the backward pass: in one block, smaller than the weight."""
    return hidden.dtype is torch.float32 and 0 < len(hidden) <= min(BLOCK, weight.shape[1])


def with_new(weight: Tensor, rows: Tensor | None, new: Tensor | None) -> Tensor:
    """Return ``weight`` (vocabulary, width) with ``new`` (n, width) in its ``rows`` (n,), if given."""
    return weight if rows is None or new is None else weight.index_copy(0, rows, new.to(weight.dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; ``total`` may be in a wider format."""
    if total.dtype is left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def sum_like(weight: Tensor) -> Tensor:
    """Return zeros to sum a gradient in, fp32 for fp16: the sum is not yet divided and could exceed 65504."""
    return torch.zeros_like(weight, dtype=torch.float32 if weight.dtype is torch.float16 else weight.dtype)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``gradient`` times a scalar, in ``dtype``. A loss scale of 65536 alone overflows fp16."""
    if dtype is torch.float16:
        return gradient.float().mul_(factor.float()).to(dtype)
    return gradient.mul_(factor.to(gradient.dtype)).to(dtype)


def blocks(hidden: Tensor) -> Iterator[slice]:
    """Yield the rows of ``hidden`` (targets, width) whose logits exist at the same time."""
    rows = BLOCK if hidden.dtype.itemsize >= 4 else BLOCK // 2
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


def gradient_blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradient by the logits of each block of targets, and fill ``losses`` (targets,)."""
    for here, logits in logit_blocks(hidden, weight, bias):
        yield here, loss_and_gradient(logits, labels[here], losses[here])


def logit_blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of each block of targets. All blocks have the same memory: use one before the next."""
    buffer: Tensor | None = None
    for here in blocks(hidden):
        rows = hidden[here]
        buffer = rows.new_empty(len(rows), len(weight)) if buffer is None else buffer
        logits = buffer[: len(rows)]
        at_once = SLICE if rows.device.type == "cpu" and rows.dtype is torch.float32 else len(weight)
        for first in range(0, len(weight), at_once):
            words = slice(first, first + at_once)
            torch.mm(rows, weight[words].t(), out=logits[:, words])
        if bias is not None:
            logits += bias
        yield here, logits


@torch.no_grad()
def target_losses(given: BlockedArguments, entropies: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each target and, where asked for, the entropy of the distribution there, (targets,) each.

    For a pass without gradients: no gradient by the logits is computed. ``given``: see :func:`blocked`."""
    hidden, weight, bias, labels, rows, new = given
    used = with_new(weight, rows, new)
    losses = torch.zeros(len(hidden), dtype=exact_dtype(hidden), device=hidden.device)
    found = torch.zeros_like(losses)
    for here, logits in logit_blocks(hidden, used, bias):
        if kernels.available(logits):
            results = losses[here], found[here]
            kernels.call("losses_and_entropies", logits.dtype, logits, labels[here], *results, *logits.shape)
            continue
        exact = logits.to(losses.dtype)
        losses[here] = torch.logsumexp(exact, dim=-1) - exact.gather(1, labels[here, None])[:, 0]
        if entropies:
            found[here] = entropies_of(exact)
    return losses, found if entropies else None


def entropies_of(logits: Tensor) -> Tensor:
    """(n, vocabulary) -> (n,): -sum p log p of each row's softmax, differentiable."""
    exact = logits.to(exact_dtype(logits)).log_softmax(dim=-1)
    finite = exact.clamp_min(torch.finfo(exact.dtype).min)  # 0 log 0 = 0, and what is not a number stays so
    return -(exact.exp() * finite).sum(dim=-1)


def loss_and_gradient(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """Fill ``losses`` (rows,) and return softmax(logits) - onehot; may overwrite ``logits``."""
    if kernels.available(logits):
        kernels.call("cross_entropy", logits.dtype, logits, labels, losses, logits.shape[0], logits.shape[1])
        return logits
    exact = logits.to(exact_dtype(logits))
    normaliser = torch.logsumexp(exact, dim=-1)
    losses.copy_(normaliser - exact.gather(1, labels[:, None])[:, 0])
    gradient = exact.sub_(normaliser[:, None]).exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient.to(logits.dtype)
