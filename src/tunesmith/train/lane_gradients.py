"""Losses and gradients of micro-batches that run at the same time, each lane's in sums of its own.

Sums of floats depend on the order of their terms, and threads end in any order. Each lane adds its micro-batches in order, and
the sums of the lanes are joined in order, so a run computes the same bits each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tunesmith.data.batch import lane_groups
from tunesmith.models import lanes
from tunesmith.train.metric_sums import Sums


def sums(
    run: Callable[[list[int], int], Sums | int], tokens: Sequence[int], budget: int, number: int
) -> Sums | int:
    """Return the sums of micro-batches of ``tokens``, in descending order, in ``number`` lanes; see ``models.lanes.run``.

    ``run(numbers, lane)`` returns the sums of some of them, or the index in ``numbers`` of one that did not fit into memory.
    Then this function returns its number.
    """
    alone = lane_groups.count_alone(tokens, budget, number)
    first = run(list(range(alone)), 0)
    if isinstance(first, int) or alone == len(tokens):
        return first
    shares = [[alone + index for index in share] for share in lane_groups.shared_out(tokens[alone:], number)]
    loss, metrics = first
    for share, outcome in zip(
        shares, lanes.in_threads(lambda lane: run(shares[lane], lane), number), strict=True
    ):
        if isinstance(outcome, int):
            return share[outcome]
        loss = loss + outcome[0]
        for name, pair in outcome[1].items():
            metrics[name] = metrics[name] + pair if name in metrics else pair
    return loss, metrics


class LaneGradients:
    """Sums in fp32 of the gradients by ``parameters``, for every lane but the first, whose sums are ``.grad``.

    The backward pass of another lane gives each gradient to a hook, which adds it at once: all gradients of a pass never exist
    at the same time.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._sums: dict[int, dict[str, torch.Tensor]] = {}
        self._current = threading.local()

    def install_hooks(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.register_hook(partial(self._take, name))  # type: ignore[no-untyped-call]

    def backward(self, loss: torch.Tensor, lane: int) -> None:
        """Add the gradient of ``loss`` to the sums of ``lane``, counted from 1."""
        self._sums.setdefault(lane, {})
        self._current.lane = lane
        try:
            torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        finally:
            self._current.lane = 0

    def _take(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        lane = vars(self._current).get("lane", 0)
        if lane == 0:
            return None
        sums = self._sums[lane]
        if name in sums:
            sums[name].add_(gradient)
        else:
            sums[name] = gradient.to(
                torch.float32, copy=True
            )  # autograd may give one tensor to several weights
        return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps until the pass ends

    def join(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Add the sums of all lanes to the gradients of ``masters``, and forget them."""
        for lane in sorted(self._sums):
            for name, total in self._sums[lane].items():
                gradient = masters[name].grad
                masters[name].grad = total if gradient is None else gradient.add_(total)
        self.clear()

    def clear(self) -> None:
        self._sums = {}
