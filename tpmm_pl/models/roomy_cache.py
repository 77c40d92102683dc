"""A cache of keys and values that has room ahead: a new token copies no old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache; layers of other kinds than full attention are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def rows_can_be_chosen(cache: DynamicCache) -> bool:
    """Tell whether all layers hold keys and values, whose rows can be copied and dropped.

    The states of recurrent layers are kept in other ways.
    """
    kinds = (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in cache.layers)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, ``(N, heads, T, width)`` each: views of larger tensors.

    The layer of transformers concatenates, which copies all rows for each new token.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = 0
        self._stores: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._stores = tuple(states[:, :, :0] for states in new)
        end = self._length + key_states.shape[2]
        if end > self._stores[0].shape[2]:
            rows = torch.arange(len(key_states), device=key_states.device)
            self._copy(rows, end)
        for store, states in zip(self._stores, new, strict=True):
            store[:, :, self._length : end] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copy or drop rows."""
        if self._length:
            self._copy(indices, self._length)
            self._show(self._length)

    def _copy(self, rows: Tensor, length: int) -> None:
        # an eighth more: a cache that grows is copied each time it is an eighth longer, and one
        # whose rows are dropped at every step takes hardly more memory
        stores = []
        for old in self._stores:
            _, heads, _, width = old.shape
            store = old.new_empty(len(rows), heads, length + length // 8 + 1, width)
            filled = store[:, :, : self._length]
            torch.index_select(old[:, :, : self._length], 0, rows, out=filled)
            stores.append(store)
        self._stores = tuple(stores)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        keys, values = (store[:, :, :length] for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values
