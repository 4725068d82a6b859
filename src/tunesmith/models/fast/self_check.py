"""Compare a replaced forward with the module's own on a small random input, before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tunesmith.models.network import FORWARD_ERRORS, attribute

Forward: TypeAlias = Callable[..., Any]
"""The forward of a layer: it returns a tensor, or a tuple whose first element is one."""
Arguments: TypeAlias = tuple[tuple[Tensor, ...], dict[str, object]]
"""Positional and keyword arguments of a forward."""
LayerKind: TypeAlias = tuple[
    Callable[[nn.Module], Forward | None], Callable[[nn.Module, torch.dtype], Arguments]
]
"""The function that makes a layer's forward (None for another kind), and arguments to check it with."""
TOKENS = 8
"""Tokens of the random input."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference, as a share of the output's norm."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_input(
    module: nn.Module, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Arguments:
    """Return hidden states (1, TOKENS, width) for a module, whose first linear layer or weight has the width."""
    widths = [attribute(layer, "in_features") for layer in module.modules()]
    width = next((width for width in widths if width), None) or attribute(module, "weight").shape[-1]
    return (torch.randn(1, TOKENS, width, generator=generator or seeded()).to(dtype),), {}


@torch.no_grad()
def why_not(
    module: nn.Module,
    forward: Forward,
    make_arguments: Callable[[nn.Module, torch.dtype], Arguments],
    dtype: torch.dtype,
) -> str | None:
    """Return None if ``forward`` agrees with the forward of the module's class within ``TOLERANCE``, else why
    not.

    A class with the names of a known layer may need other arguments, or return another type. Then one of the
    two forwards fails, and the module keeps its own.
    """
    try:
        positional, named = make_arguments(module, dtype)
        outs = forward(*positional, **named), type(module).forward(module, *positional, **named)
        ours, theirs = ((out[0] if isinstance(out, tuple) else out).float() for out in outs)
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))
    except FORWARD_ERRORS as error:
        return f"it failed on random numbers ({describe(error)})"
    return None if difference <= TOLERANCE[dtype] else f"it differed on random numbers by {difference:.1e}"


class Checks:
    """Checks of the layers of one network in ``dtype``: of each structure, one layer that agrees with its own forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._agreed: set[tuple[object, ...]] = set()

    def why_not(
        self,
        module: nn.Module,
        forward: Forward,
        make_arguments: Callable[[nn.Module, torch.dtype], Arguments],
    ) -> str | None:
        """Return :func:`why_not`; None without a check if a layer of the same structure agreed."""
        key = _structure(module)
        if key in self._agreed:
            return None
        found = why_not(module, forward, make_arguments, self.dtype)
        if found is None:
            self._agreed.add(key)
        return found


def _structure(module: nn.Module) -> tuple[object, ...]:
    """Return everything about a module and all modules in it but the numbers in its weights and that of its layer."""
    parts = []
    for name, part in module.named_modules():
        settings = [
            (key, value) for key, value in vars(part).items() if isinstance(value, (bool, int, float, str))
        ]
        shapes = [
            (key, weight.shape, weight.requires_grad) for key, weight in part.named_parameters(recurse=False)
        ]
        parts.append((name, type(part), *(one for one in settings if one[0] != "layer_idx"), *shapes))
    return tuple(parts)


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error that a forward raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
