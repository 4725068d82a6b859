"""The policy at step 0, for an objective that compares the policy with it in every iteration.

What trains is copied before the first step: the weights of an adapter, or all weights in a full fine-tuning.
Adapters that are switched off would be the policy at step 0 only where they start as the identity (not a
continued adapter, PiSSA, a random prefix, or a trained output layer), and the copy of an adapter is small. A
resumed run makes the same copy, before it loads the checkpoint: base model and seed are those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from tunesmith.runs.figure_format import size


class WeightsAtStart:
    """A copy of the trained ``parameters`` of the network."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @property
    def bytes(self) -> int:
        return sum(one.nbytes for one in self._kept.values())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the weights of step 0 into the network inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the values in place: fused layers may keep several weights in one piece of memory."""
        for name, parameter in self._parameters.items():
            now = parameter.detach().clone()
            parameter.copy_(self._kept[name])
            self._kept[name] = now


def weights_line(
    model: torch.nn.Module, masters: Mapping[str, torch.Tensor], start: WeightsAtStart | None
) -> str:
    """Return a line with the memory of the weights of policy, value model and reference.

    ``masters``: what the optimiser updates; in fp32 the network's own parameters."""
    network = {one.data_ptr(): one.nbytes for one in model.parameters()}
    others = sum(one.nbytes for one in masters.values() if one.data_ptr() not in network)
    parts = [f"the network {size(sum(network.values()))}"]
    parts += [f"fp32 masters of what is trained {size(others)}"] * bool(others)
    kept = 0 if start is None else start.bytes
    parts += [f"the reference, a copy of what is trained, {size(kept)}"] * bool(kept)
    return f"weights: {size(sum(network.values()) + others + kept)} in memory: {', '.join(parts)}"
