"""A key-value cache that is allocated once; transformers' own copies all of it at every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one full-attention layer, (batch, heads, capacity, head_dim), filled from the left.

    ``update`` returns views of the filled part, so attention never reads the rest.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[3])
                for states in (key_states, value_states)
            )
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """Return the cache of a model with ``config``, its full-attention layers with room for ``capacity``
    tokens.

    Layers of other kinds (sliding-window, recurrent) are transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
