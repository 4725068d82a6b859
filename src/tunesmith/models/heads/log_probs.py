"""The log-probability of each target, for losses that give each a coefficient of its own, without the logits of a batch.

``head.lm_loss`` sums over targets, so its gradients can be summed in the forward pass too. Here backward says how much each
target counts. While only the hidden states want gradients, each target's own is made in the forward, when a block's logits are
at hand, and multiplied in backward. Where the output layer is trained too, backward makes the logits of each block again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.models.heads import lm_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_probs(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """log p(label) of each target, (targets,) in fp32, or fp64 where the network is: differentiable.

    ``batch`` as in ``head.lm_loss``: ``labels`` (targets,), predicted at ``positions`` (targets,) of the flattened batch.
    """
    given = lm_head.blocked(model, batch)
    return -lm_head.plain_losses(model, batch) if given is None else BlockedLogProbs.apply(*given)


def answer_logps(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """log p(answer | prompt) of each answer, (answers,): the sum over its targets, which ``owners`` (targets,) assigns to it.

    Summed in fp64 where the device has it: hundreds of terms, and what a loss compares are differences of such sums.
    """
    found = log_probs(model, batch)
    exact = found if found.device.type == "mps" else found.to(torch.float64)
    return exact.new_zeros(len(batch["tokens"])).index_add(0, batch["owners"].to(found.device), exact)


class BlockedLogProbs(torch.autograd.Function):
    """log softmax(h_i W^T + b)[label_i], (targets,). Arguments are those of ``head.BlockedCrossEntropy``.

    Kept for backward: a gradient like ``hidden``; or ``hidden`` itself, where the output layer wants gradients. No logits.
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
        ctx.again = any(ctx.needs_input_grad[1:])
        losses = torch.zeros(len(hidden), dtype=lm_head.exact_dtype(hidden), device=hidden.device)
        by_target = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not ctx.again else None
        used = lm_head.with_new(weight, rows, new)
        for start in range(0, len(hidden), lm_head.BLOCK):
            here = slice(start, start + lm_head.BLOCK)
            gradient = lm_head.loss_and_gradient(
                nn.functional.linear(hidden[here], used, bias), labels[here], losses[here]
            )
            if by_target is not None:
                torch.mm(gradient, used, out=by_target[here])
        if ctx.again:
            ctx.save_for_backward(hidden, weight, bias, labels, rows, new)
        else:
            ctx.save_for_backward(by_target)
        return losses.neg_()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if not ctx.again:
            (by_target,) = ctx.saved_tensors
            return (by_target * -grad[:, None]).to(by_target.dtype), None, None, None, None, None
        hidden, weight, bias, labels, rows, new = ctx.saved_tensors
        # shares of at most 1 while sums are made: in fp16 those of a scaled loss would pass what it holds
        most = nn.functional.pad(grad.abs(), (0, 1), value=torch.finfo(grad.dtype).tiny).amax()
        shares = -grad / most
        trained = (weight, bias, new)
        to_weight, to_bias, to_new = sums = [
            lm_head.sum_like(x) if x is not None and ctx.needs_input_grad[place] else None
            for place, x in zip((1, 2, 5), trained, strict=True)
        ]
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        used, unused = lm_head.with_new(weight, rows, new), torch.empty_like(grad)
        for start in range(0, len(hidden), lm_head.BLOCK):
            here = slice(start, start + lm_head.BLOCK)
            gradient = lm_head.loss_and_gradient(
                nn.functional.linear(hidden[here], used, bias), labels[here], unused[here]
            )
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
            to_weight[rows] = 0  # others stood in their place
        ends = [
            None if total is None else (total * most).to(x.dtype)
            for total, x in zip(sums, trained, strict=True)
        ]
        return to_hidden, ends[0], ends[1], None, None, ends[2]
