"""The log-probability of each target, for losses with a coefficient for each target.

``lm_head.lm_loss`` sums over targets, so its forward pass can sum the gradients too. Here the coefficients
come with backward. While only the hidden states need gradients, forward computes the gradient of each target
from a block's logits, and backward multiplies it. Where the output layer is trained too, backward computes
the logits of each block again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.heads import lm_head
from tunesmith.models.heads.lm_head import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_probs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return log p(label) of each target, (targets,), differentiable. ``batch``: see ``lm_head.lm_loss``.

    ``temperature``: p is the softmax of the logits divided by it, from which an answer was sampled.
    """
    return at_targets(model, batch, temperature).logps


@dataclass(frozen=True)
class AtTargets:
    """The result of one pass through the body: log p(label) of each target and, where asked for, the entropy of
    the distribution there, (targets,) each; the hidden states that predict the targets, (targets, width),
    None if the model's head is unknown."""

    logps: Tensor
    hidden: Tensor | None
    entropies: Tensor | None = None


def at_targets(
    model: PreTrainedModel, batch: Batch, temperature: float = 1.0, entropies: bool = False
) -> AtTargets:
    """Return :func:`log_probs`, hidden states and ``entropies``, differentiable where gradients are enabled.

    Without them nothing is computed that only a backward pass needs."""
    given = lm_head.blocked(model, batch)
    if given is None:
        logits, labels, hidden = lm_head.plain_logits(model, batch)
        logits = logits / temperature
        logps = -nn.functional.cross_entropy(logits, labels, reduction="none")
        return AtTargets(logps, hidden, lm_head.entropies_of(logits) if entropies else None)
    scaled = _tempered(given, temperature)
    if not torch.is_grad_enabled():
        losses, found = lm_head.target_losses(scaled, entropies)
        return AtTargets(losses.neg_(), given[0], found)
    logps = BlockedLogProbs.apply(*scaled)
    return AtTargets(logps, given[0], _blocked_entropies(*scaled) if entropies else None)


def _blocked_entropies(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    new: Tensor | None,
) -> Tensor:
    """The entropy of each target, (targets,). Backward computes the logits of a block again."""
    used = lm_head.with_new(weight, rows, new)

    def of_block(states: Tensor) -> Tensor:
        return lm_head.entropies_of(nn.functional.linear(states, used, bias))

    parts = [checkpoint(of_block, hidden[here], use_reentrant=False) for here in lm_head.blocks(hidden)]
    return torch.cat(parts) if parts else of_block(hidden)


def _tempered(given: lm_head.BlockedArguments, temperature: float) -> lm_head.BlockedArguments:
    """Divide the logits by ``temperature``: hidden states and bias, which are far smaller."""
    if temperature == 1.0:
        return given
    hidden, weight, bias, labels, rows, new = given
    scaled_bias = None if bias is None else bias / temperature
    return hidden / temperature, weight, scaled_bias, labels, rows, new


def answer_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return log p(answer | prompt), (answers,): sums over targets, by the answer in ``owners`` (targets,).

    In fp64 where the device has it: sums have hundreds of terms, and losses compare their differences.
    """
    logps = log_probs(model, batch)
    exact = logps if logps.device.type == "mps" else logps.to(torch.float64)
    return exact.new_zeros(len(batch["tokens"])).index_add(0, batch["owners"].to(logps.device), exact)


class BlockedLogProbs(torch.autograd.Function):
    """log softmax(h_i W^T + b)[label_i], (targets,). Arguments are those of ``lm_head.BlockedCrossEntropy``.

    Saved for backward: a gradient like ``hidden``, or ``hidden`` itself where the output layer needs
    gradients; no logits.
    """

    @staticmethod
    def forward(
        ctx: Context[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None = None,
        new: Tensor | None = None,
    ) -> Tensor:
        ctx.kept = any(ctx.needs_input_grad[1:])
        given = hidden, weight, bias, labels, rows, new
        if ctx.kept or not ctx.needs_input_grad[0]:
            ctx.save_for_backward(*given)
            return lm_head.target_losses(given)[0].neg_()
        losses = torch.zeros(len(hidden), dtype=lm_head.exact_dtype(hidden), device=hidden.device)
        by_target, used = torch.empty_like(hidden), lm_head.with_new(weight, rows, new)
        for here, gradient in lm_head.gradient_blocks(hidden, used, bias, labels, losses):
            torch.mm(gradient, used, out=by_target[here])
        ctx.save_for_backward(by_target)
        return losses.neg_()

    @staticmethod
    def backward(ctx: Context[bool], grad: Tensor) -> Gradients:
        if not ctx.kept:
            (by_target,) = ctx.saved_tensors
            return (by_target * -grad[:, None]).to(by_target.dtype), None, None, None, None, None
        hidden, weight, bias, labels, rows, new = ctx.saved_tensors
        # coefficients of at most 1 while sums are made: those of a scaled loss could exceed what fp16 holds
        most = nn.functional.pad(grad.abs(), (0, 1), value=torch.finfo(grad.dtype).tiny).amax()
        shares = -grad / most
        trained = (weight, bias, new)
        to_weight, to_bias, to_new = sums = [
            lm_head.sum_like(x) if x is not None and ctx.needs_input_grad[argument] else None
            for argument, x in zip((1, 2, 5), trained, strict=True)
        ]
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        used, unused = lm_head.with_new(weight, rows, new), torch.empty_like(grad)
        for here, gradient in lm_head.gradient_blocks(hidden, used, bias, labels, unused):
            scaled = (hidden[here] * shares[here, None]).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[here] = (gradient @ used) * -grad[here, None]
            if to_weight is not None:
                lm_head.add_product(to_weight, gradient.t(), scaled)
            if to_bias is not None:
                to_bias += shares[here].to(gradient.dtype) @ gradient
            if to_new is not None:
                lm_head.add_product(to_new, gradient[:, rows].t(), scaled)
        if to_weight is not None and rows is not None:
            to_weight[rows] = 0  # ``new`` replaced them
        pairs = zip(sums, trained, strict=True)
        ends = [None if total is None else (total * most).to(x.dtype) for total, x in pairs]
        return to_hidden, ends[0], ends[1], None, None, ends[2]
