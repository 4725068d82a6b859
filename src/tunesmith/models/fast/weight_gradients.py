"""Gradients of weights that are added to their sums at once, without a tensor of their own for each weight.

The gradients of all weights have as many numbers as the network, and each micro-batch has its own. Whoever sums them
(``train.lane_gradients``) receives each as soon as it is computed, in memory that the next one overwrites. Otherwise they go
to autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.models.fast.autograd_context import Context, Gradients

SLICE = 8192
"""Most rows of a weight whose gradient is in memory: that of a vocabulary has five times as many."""

Rows = Tensor | slice
"""Some rows of a weight: their indices, or from one to another."""


class Receiver(Protocol):
    """Adds a gradient to the sum of its weight."""

    def __call__(self, weight: Tensor, gradient: Tensor, rows: Rows | None = None) -> bool:
        """Add ``gradient``, of the shape of ``weight``, or (n, width) of its ``rows``. The memory of ``gradient`` may
        change afterwards.

        Returns False if the weight has no sum here."""


_thread = threading.local()


@contextmanager
def received_by(receiver: Receiver) -> Iterator[None]:
    """Let ``receiver`` receive the gradients of a backward pass in this thread."""
    _thread.receiver, _thread.received = receiver, set()
    try:
        yield
    finally:
        _thread.receiver = None


def hand_over(weight: Tensor, gradient: Tensor, rows: Rows | None = None) -> bool:
    """Give ``gradient`` to the receiver, if there is one that takes it."""
    receiver: Receiver | None = vars(_thread).get("receiver")
    return receiver is not None and receiver(weight, gradient, rows)


def instead(weight: Tensor) -> Tensor | None:
    """Return what autograd gets for a gradient that was handed over: zeros without memory, once for each weight.

    Autograd would add those of a second layer with the same weight to them, in memory."""
    if id(weight) in _thread.received:
        return None
    _thread.received.add(id(weight))
    return weight.new_zeros(()).expand(weight.shape)


def is_complete(weight: Tensor, gradient: Tensor) -> bool:
    """Return whether the receiver has the whole gradient, so that ``gradient``, which autograd computed, is zero."""
    return id(weight) in _thread.received and not any(gradient.stride())


def of_product(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return grad^T x for ``grad`` (tokens, out) and ``x`` (tokens, in), as the gradients of ``weights``, whose rows it has."""
    rows = [len(weight) for weight in weights]
    if vars(_thread).get("receiver") is None or not all(needed):
        product = grad.t() @ x
        return [part if need else None for part, need in zip(product.split(rows), needed, strict=True)]
    if len(weights) == 1:
        return [_in_slices(grad, x, weights[0])]
    product = _product(grad, x)
    parts = zip(weights, product.split(rows), strict=True)
    return [instead(weight) if hand_over(weight, part) else part.clone() for weight, part in parts]


def _in_slices(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """Hand over the gradient of ``weight`` by slices of its rows."""
    for start in range(0, len(weight), SLICE):
        rows = slice(start, start + SLICE)
        if not hand_over(weight, _product(grad[:, rows], x), rows):
            return grad.t() @ x
    return instead(weight)


def _product(grad: Tensor, x: Tensor) -> Tensor:
    product = _scratch(grad.shape[1], x.shape[1], grad)
    return torch.mm(grad.t(), x, out=product)


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return memory of this thread, (rows, columns); its numbers are those that were there before."""
    kept: Tensor | None = vars(_thread).get("scratch")
    if kept is None or kept.dtype is not like.dtype or kept.numel() < rows * columns:
        kept = _thread.scratch = like.new_empty(rows * columns)
    return kept[: rows * columns].view(rows, columns)


class ReadRows(torch.autograd.Function):
    """``weight[ids]``: ids (...), weight (vocabulary, width). The gradient has the rows that were read, not the vocabulary."""

    @staticmethod
    def forward(
        ctx: Context[tuple[Tensor, int | None]], ids: Tensor, weight: Tensor, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.kept = weight, padding
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Context[tuple[Tensor, int | None]], grad: Tensor) -> Gradients:
        (ids,), (weight, padding) = ctx.saved_tensors, ctx.kept
        places, rows = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if padding is not None:
            kept = places != padding
            places, rows = places[kept], rows[kept]
        if hand_over(weight, rows, places):
            return None, instead(weight), None
        return None, torch.zeros_like(weight).index_add_(0, places, rows), None
