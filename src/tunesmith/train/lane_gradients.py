"""Losses and gradients of micro-batches that run at the same time.

Sums of floats depend on the order of their terms, and threads end in any order. So each micro-batch of a step has a turn, and
every gradient is added in the order of the turns: a run computes the same bits each time. One that comes early waits in memory;
no thread waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from tunesmith.data.batch import lane_groups
from tunesmith.models import lanes
from tunesmith.models.fast import weight_gradients
from tunesmith.train.metric_sums import Sums


def sums(
    run: Callable[[int, int], Sums | int], tokens: Sequence[int], budget: int, number: int
) -> Sums | int:
    """Return the sums of micro-batches of ``tokens``, in descending order, in ``number`` lanes; see ``models.lanes.run``.

    ``run(index, turn)`` returns the sums of one of them, or an int if it did not fit into memory. Then this function returns
    its index, and the lanes begin no other micro-batch.
    """
    alone = lane_groups.count_alone(tokens, budget, number)
    shares = [[alone + index for index in share] for share in lane_groups.shared_out(tokens[alone:], number)]
    turns = {index: turn for turn, index in enumerate([*range(alone), *lane_groups.turns(tokens, shares)])}
    found: dict[int, Sums] = {}
    failed: list[int] = []

    def run_all(indices: Iterable[int]) -> None:
        for index in indices:
            if failed:
                return
            outcome = run(index, turns[index])
            if isinstance(outcome, int):
                failed.append(index)
            else:
                found[index] = outcome

    run_all(range(alone))
    if alone < len(tokens) and not failed:
        # a lane that is free takes the next one: cores are not equally fast
        waiting = iter(range(alone, len(tokens)))
        lanes.in_threads(lambda lane: run_all(waiting), number)
    if failed:
        return min(failed)
    loss, metrics = found[0]
    for index in range(1, len(tokens)):
        loss = loss + found[index][0]
        for name, pair in found[index][1].items():
            metrics[name] = metrics[name] + pair if name in metrics else pair
    return loss, metrics


class LaneGradients:
    """Adds the gradients by ``parameters`` to those of the ``masters``, which may be the parameters themselves.

    The backward pass gives each gradient to a hook, which adds it at once: all gradients of a pass never exist at the same
    time.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], masters: Mapping[str, torch.Tensor]
    ) -> None:
        self.parameters = dict(parameters)
        self._sums = {name: _OrderedSum(master) for name, master in masters.items()}
        self._by_weight = {id(weight): self._sums[name] for name, weight in self.parameters.items()}
        self._current = threading.local()

    def install_hooks(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.register_hook(partial(self._take, name))  # type: ignore[no-untyped-call]

    def backward(self, loss: torch.Tensor, turn: int) -> None:
        """Add the gradient of ``loss`` as that of number ``turn`` of the step, counted from 0."""
        self._current.turn = turn
        try:
            with weight_gradients.received_by(partial(self._receive, turn)):
                taken = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        finally:
            self._current.turn = None
        for total, gradient in zip(self._sums.values(), taken, strict=True):
            if gradient is None:  # no hook was called: the weight took no part
                total.end(turn)

    def _take(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        turn = vars(self._current).get("turn")
        if turn is None:
            return None
        if not weight_gradients.is_complete(self.parameters[name], gradient):
            self._sums[name].add(turn, gradient)
        self._sums[name].end(turn)
        return gradient.new_zeros(()).expand_as(gradient)  # what autograd keeps until the pass ends

    def _receive(
        self, turn: int, weight: torch.Tensor, gradient: torch.Tensor, rows: weight_gradients.Rows | None
    ) -> bool:
        total = self._by_weight.get(id(weight))
        if total is None:
            return False
        total.add(turn, gradient, rows)
        return True

    def clear(self) -> None:
        for total in self._sums.values():
            total.clear()


class _OrderedSum:
    """Adds the gradients of one weight to its ``master``'s in the order of their turns."""

    def __init__(self, master: torch.Tensor) -> None:
        self.master = master
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self._next = 0
        self._ended: set[int] = set()
        self._early: dict[int, list[tuple[torch.Tensor, weight_gradients.Rows | None]]] = {}

    def add(self, turn: int, gradient: torch.Tensor, rows: weight_gradients.Rows | None = None) -> None:
        """Add a part of the gradient of ``turn``: that of the ``rows``, or of all of them. It may be overwritten afterwards."""
        with self._lock:
            if turn == self._next:
                self._add(gradient, rows)
            else:
                self._early.setdefault(turn, []).append((gradient.clone(), rows))

    def end(self, turn: int) -> None:
        """Close ``turn``: its gradient has all its parts."""
        with self._lock:
            self._ended.add(turn)
            while self._next in self._ended:
                self._next += 1
                for gradient, rows in self._early.pop(self._next, []):
                    self._add(gradient, rows)

    def _add(self, gradient: torch.Tensor, rows: weight_gradients.Rows | None) -> None:
        total = self.master.grad
        if total is None and rows is None:
            self.master.grad = torch.empty_like(self.master, requires_grad=False).copy_(gradient)
            return
        if total is None:
            total = self.master.grad = torch.zeros_like(self.master, requires_grad=False)
        if isinstance(rows, torch.Tensor):
            total.index_add_(0, rows, gradient.to(total.dtype))
        else:
            total[... if rows is None else rows].add_(gradient)
