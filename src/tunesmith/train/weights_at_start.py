"""The policy at step 0, for an objective that compares the policy with it in every iteration.

What trains is copied before the first step: the weights of an adapter, or all weights in a full fine-tuning.
Adapters that are switched off would be the policy at step 0 only where they start as the identity (not a
continued adapter, PiSSA, a random prefix, or a trained output layer), and the copy of an adapter is small. A
resumed run makes the same copy, before it loads the checkpoint: base model and seed are those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from tunesmith.runs.figure_format import size


class WeightsAtStart:
    """A copy of the trained ``parameters`` of the network."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._kept.values())

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
    """Return a line with the memory and the parameters of policy, value model and reference.

    ``masters``: what the optimiser updates; in fp32 the network's own parameters."""
    network = {one.data_ptr(): one for one in model.parameters()}
    parts: dict[str, list[torch.Tensor]] = {"the network": [*network.values()]}
    parts["fp32 masters of what is trained"] = [
        one for one in masters.values() if one.data_ptr() not in network
    ]
    parts["the reference, a copy of what is trained,"] = [] if start is None else start.tensors
    listed = ", ".join(
        f"{name} {size(_bytes(some))} ({_count(some)})" for name, some in parts.items() if some
    )
    return f"weights: {size(sum(map(_bytes, parts.values())))} in memory: {listed}"


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


def _count(tensors: Sequence[torch.Tensor]) -> str:
    return f"{sum(one.numel() for one in tensors):,} parameters"
