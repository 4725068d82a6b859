"""The adapters of the running rows: each row may use another of the loaded adapters, or none.

LoRAs run together: their factors are stacked, and each token keeps the part of its own adapter (``LoraStack``).
Other types run in turns, one adapter after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models import network
from tunesmith.models.adapters import lora_factors, virtual_tokens

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    Forward: TypeAlias = Callable[[Tensor], Tensor]

ACTIVE: Final = "<active>"
"""The model as it is, with the adapters that are active in it."""
RANKS = 16
"""The rank of each adapter in a stack is a multiple of this."""


class CannotStack(Exception):
    """The adapters are not plain LoRAs of linear layers, or a layer does not get all tokens in their order."""


@dataclass(frozen=True, eq=False)
class LoraStack:
    """The LoRAs ``names`` of a network as one: y += B (keep * A x), with the factors of all adapters stacked.

    ``factors``: A (ranks, in) and B (out, ranks), scaling included, of each layer that has a LoRA. ``ranks``: the
    rank of each adapter, the same in all layers; where it is smaller, or the adapter has none, there are zeros.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    factors: dict[LoraLayer, tuple[Tensor, Tensor]]
    _cast: dict[torch.dtype, dict[nn.Module, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def of(layers: Sequence[LoraLayer], names: Sequence[str]) -> LoraStack:
        """Copy the factors of ``layers`` as they are now. Raises CannotStack."""
        if not names:
            return LoraStack((), (), {})
        pairs = {layer: [_factors(layer, name) for name in names] for layer in layers}
        largest = [max(pair[n][0].shape[0] for pair in pairs.values()) for n in range(len(names))]
        ranks = tuple(-(-rank // RANKS) * RANKS for rank in largest)
        factors = {}
        for layer, pair in pairs.items():
            padded = [
                (_pad(a, rank - len(a), 0), _pad(b, rank - len(a), 1))
                for (a, b), rank in zip(pair, ranks, strict=True)
            ]
            factors[layer] = torch.cat([a for a, _ in padded]), torch.cat([b for _, b in padded], dim=1)
        return LoraStack(tuple(names), ranks, factors)

    def factors_in(self, dtype: torch.dtype) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return the factors in the type of the network's weights."""
        if dtype not in self._cast:
            self._cast[dtype] = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in self.factors.items()}
        return self._cast[dtype]

    def keep(self, adapters: Sequence[str | None]) -> Tensor:
        """Return 1 for the ranks of each token's own adapter, else 0, fp32 (tokens, ranks)."""
        owner = torch.repeat_interleave(torch.arange(len(self.names)), torch.tensor(self.ranks))
        number = {name: n for n, name in enumerate(self.names)}
        wanted = torch.tensor([-1 if name is None else number[name] for name in adapters])
        return (wanted[:, None] == owner).float()


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer, scaling included; of rank 0 where the adapter is not in this layer."""
    base = network.without_adapter(layer)
    if not (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"):
        raise CannotStack(f"{type(base).__name__} has a LoRA")
    if name not in layer.lora_A:
        weight = next(iter(layer.lora_A.values())).weight
        return weight.new_zeros(0, layer.in_features), weight.new_zeros(layer.out_features, 0)
    lora = lora_factors.read_adapter(layer, name)
    if lora is None:
        raise CannotStack(f"{name} is not a plain LoRA")
    return lora.down(), lora.up()


def _pad(factor: Tensor, count: int, dim: int) -> Tensor:
    shape = (count, factor.shape[1]) if dim == 0 else (factor.shape[0], count)
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


class RowAdapters:
    """The adapters loaded into ``core``. ``names``: those that a row may name, in addition to None, the base."""

    def __init__(self, core: PreTrainedModel) -> None:
        self.core = core
        self.layers = network.adapter_layers(core)
        self.names = sorted({name for layer in self.layers for name in layer._get_available_adapters()})
        self.active = self._active()
        """The adapter that the network uses, None for the base; ``ACTIVE`` where layers differ or use several."""
        self._stack: LoraStack | None = None

    def _active(self) -> str | None:
        states = {None if layer.disable_adapters else tuple(layer.active_adapters) for layer in self.layers}
        if not states:
            return ACTIVE if virtual_tokens.is_installed(self.core) else None
        state, *others = states
        if others or (state is not None and len(state) != 1):
            return ACTIVE
        return None if state is None else str(state[0])

    def resolve(self, adapter: str | None) -> str | None:
        """Return the adapter that a request means. Raises UserError for one that is not loaded."""
        if adapter in (ACTIVE, self.active):
            return self.active
        if adapter is None and virtual_tokens.is_installed(self.core):
            raise UserError(
                "a request cannot turn virtual tokens off. Load the base model for answers without them."
            )
        if adapter is not None and adapter not in self.names:
            known = ", ".join([*map(repr, self.names), "None (the base)"])
            raise UserError(f"no adapter called {adapter!r} is loaded: expected one of {known}")
        return adapter

    def forget(self) -> None:
        """Drop the copies of the factors: the weights have changed."""
        self._stack = None

    def stack(self, adapters: Sequence[str | None]) -> LoraStack:
        """Return the stack of all of ``adapters``, which may hold more. Raises CannotStack."""
        wanted = {name for name in adapters if name is not None}
        if ACTIVE in wanted:
            raise CannotStack("several adapters are active at once")
        if self._stack is None or not wanted <= {*self._stack.names}:
            if any(not network.has_attributes(layer, "lora_A") for layer in self.layers):
                raise CannotStack("a layer has another adapter than a LoRA")
            self._stack = LoraStack.of(
                self.layers, sorted(wanted | {*(self._stack.names if self._stack else ())})
            )
        return self._stack

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the network with one adapter, or none, inside the ``with`` block."""
        if adapter in (ACTIVE, self.active):
            yield
            return
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        try:
            with self._own_forwards():
                yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    @contextmanager
    def together(self, adapters: Sequence[str | None], last: Sequence[int]) -> Iterator[None]:
        """Run tokens of several adapters side by side inside the ``with`` block.

        ``adapters``: that of each token. ``last``: the tokens whose logits are computed, for a LoRA on the
        output layer. Raises CannotStack, also inside the block.
        """
        stack = self.stack(adapters)
        keep = stack.keep(adapters).to(self.core.device)
        rows = {len(keep): keep, len(last): keep[list(last)]}
        with self._own_forwards(), ExitStack() as restored:
            for layer, (a, b) in stack.factors.items():
                restored.callback(layer.__dict__.pop, "forward", None)
                layer.forward = _stacked_forward(layer.base_layer, a, b, rows)
            yield

    @contextmanager
    def _own_forwards(self) -> Iterator[None]:
        """Remove forwards that were put on modules with adapters inside: they read the active adapter alone."""
        inside = {*self.layers}
        replaced = [
            module
            for module in self.core.modules()
            if "forward" in vars(module) and not inside.isdisjoint(module.modules())
        ]
        forwards = [(module, module.__dict__.pop("forward")) for module in replaced]
        try:
            yield
        finally:
            for module, forward in forwards:
                module.forward = forward


def _stacked_forward(base: nn.Module, a: Tensor, b: Tensor, rows: dict[int, Tensor]) -> Forward:
    """Return the forward of a layer: x (1, tokens, in) -> base(x) + B (keep * A x). ``rows``: keep, by length."""

    def forward(x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[0] != 1 or x.shape[1] not in rows:
            raise CannotStack(f"a layer gets {tuple(x.shape)} instead of all tokens in their order")
        y: Tensor = base(x)
        low = nn.functional.linear(x.to(a.dtype), a) * rows[x.shape[1]].to(a.dtype)
        return (y + nn.functional.linear(low, b)).to(y.dtype)

    return forward
