"""A key-value cache that is allocated once, where the model's own kind of cache copies all of it at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class Preallocated(DynamicLayer):
    """Keys and values of one full-attention layer, (batch, heads, capacity, head_dim), filled from the left.

    ``update`` returns views of the filled part, so attention never reads what is not there yet.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
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


def preallocated_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache that a model with ``config`` uses, its plain full-attention layers with room for ``capacity`` tokens.

    Sliding-window, recurrent and other layers stay the model's own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        Preallocated(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
