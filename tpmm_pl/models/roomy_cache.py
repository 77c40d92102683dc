"""A cache of keys and values that has room ahead: a new token copies no old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32
"""Tokens that a layer has room for when its rows were copied or it was full."""


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
        super().__init__()
        self._stores: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        if not self.is_initialized:
            # empty, but of the shape that stores are made from
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if not self._stores or end > self._stores[0].shape[2]:
            self._stores = [_with_room(old, end) for old in (self.keys, self.values)]
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copy or drop rows."""
        length = self.get_seq_length()
        if length:
            self._stores = [_with_room(old, length, indices) for old in (self.keys, self.values)]
            self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (store[:, :, :length] for store in self._stores)


def _with_room(old: Tensor, length: int, rows: Tensor | None = None) -> Tensor:
    if rows is None:
        rows = torch.arange(len(old), device=old.device)
    _, heads, used, width = old.shape
    store = old.new_empty(len(rows), heads, length + ROOM, width)
    torch.index_select(old, 0, rows, out=store[:, :, :used])
    return store
