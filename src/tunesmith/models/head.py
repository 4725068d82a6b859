"""The language-model head and its loss, without ever holding the logits of a batch.

Only positions that have a target go through the vocabulary projection, in blocks; the gradient of the loss is made in the
forward pass while a block's logits are at hand, so backward is a multiplication by one number. (The idea is that of the fused
linear cross-entropies of Liger and TRL, here for any device, with no recomputation.)
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tunesmith.models import kernels

BLOCK = 256  # rows of logits at a time: 25 MB in bf16 at 49 thousand words; matrix products are at full speed from here
_plain: WeakSet[nn.Module] = WeakSet()


def use_plain_head(model: nn.Module, plain: bool) -> None:
    """Whether to compute ``model``'s loss from its own logits (chosen where the blocked head was shown not to be equal)."""
    if plain:
        _plain.add(base(model))
    else:
        _plain.discard(base(model))


def base(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def hidden_states(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The body's last hidden states, (batch, seq, hidden)."""
    return base(model).base_model(**inputs(batch)).last_hidden_state


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a model's forward for a packed (``segments``) or padded (``attention_mask``) batch."""
    names = ("input_ids", "position_ids", "attention_mask", "segments")
    return {name: batch[name] for name in names if batch.get(name) is not None} | {"use_cache": False}


def lm_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of ``batch["labels"]`` (targets,), a scalar.

    ``batch["positions"]`` (targets,) are the places, in the flattened batch, that predict them.
    """
    inner = base(model)
    head = inner.get_output_embeddings()
    if inner in _plain or type(head) is not nn.Linear:
        logits = model(**inputs(batch)).logits.flatten(0, 1)[batch["positions"]]
        return torch.nn.functional.cross_entropy(
            logits if logits.dtype is torch.float64 else logits.float(), batch["labels"], reduction="sum"
        )
    hidden = hidden_states(model, batch).flatten(0, 1)[batch["positions"]]
    return BlockedCrossEntropy.apply(hidden, head.weight, head.bias, batch["labels"])


class BlockedCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(h_i W^T + b)[label_i]. ``hidden`` (targets, width), ``weight`` (vocabulary, width)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        targets = hidden.shape[0]
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        exact = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        losses = torch.zeros(max(targets, 1), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        grad_bias = torch.zeros_like(bias) if want_bias and bias is not None else None
        for start in range(0, targets, BLOCK):
            rows = hidden[start : start + BLOCK]
            block_labels = labels[start : start + BLOCK]
            logits = torch.nn.functional.linear(rows, weight, bias)
            gradient = _loss_and_gradient(logits, block_labels, losses[start : start + BLOCK])
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + BLOCK])
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), rows)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return losses.sum(dtype=torch.float32 if hidden.device.type == "mps" else torch.float64)  # thousands of terms

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias = (None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = (None, None, None)
        return hidden, weight, bias, None


def _loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Fill ``losses`` (rows,) and return softmax(logits) - onehot in the logits' dtype; ``logits`` may be overwritten."""
    if kernels.available(logits):
        kernels.call("cross_entropy", logits.dtype, logits, labels, losses, logits.shape[0], logits.shape[1])
        return logits
    exact = logits if logits.dtype is torch.float64 else logits.float()
    normaliser = torch.logsumexp(exact, dim=-1)
    losses.copy_(normaliser - exact.gather(1, labels[:, None])[:, 0])
    gradient = exact.sub_(normaliser[:, None]).exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient.to(logits.dtype)
