"""The type of ``ctx`` in tunesmith's autograd functions."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Context(Protocol[T]):
    """The ``ctx`` of ``forward`` and ``backward``. ``kept``: values that are not saved as tensors."""

    kept: T
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


Gradients = tuple[Tensor | None, ...]
"""One gradient for each argument of ``forward``; None for what needs none."""
