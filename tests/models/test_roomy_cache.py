from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, JambaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.models.tiny import tiny_llama
from tpmm_pl.models.roomy_cache import RoomyLayer, roomy_cache, rows_can_be_chosen

ROWS, HEADS, WIDTH = 3, 2, 4


def states(tokens: int, generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, rows, HEADS, tokens, WIDTH, generator=generator)
    return keys, values


def test_it_holds_what_concatenating_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()
    rows = ROWS
    for tokens, chosen in [
        (7, [0, 0, 1, 2, 2]),
        *[(1, None)] * 9,
        (1, [4, 1]),
        (3, None),
        (1, [1]),
    ]:
        added = states(tokens, generator, rows)
        for mine, other in zip(ours.update(*added), theirs.update(*added), strict=True):
            assert torch.equal(mine, other)
        if chosen is not None:
            ours.batch_select_indices(torch.tensor(chosen))
            theirs.batch_select_indices(torch.tensor(chosen))
            rows = len(chosen)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_it_copies_when_it_has_grown_by_an_eighth() -> None:
    generator = torch.Generator().manual_seed(0)
    layer, copies, last = RoomyLayer(), 0, 0
    for tokens in [400, *[1] * 100]:
        keys, _ = layer.update(*states(tokens, generator))
        copies += keys.data_ptr() != last
        last = keys.data_ptr()
    # 400, then room for 451, then for 508
    assert copies == 2
    assert layer.get_seq_length() == 500


def test_only_layers_of_full_attention_are_replaced() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    assert [type(layer) for layer in roomy_cache(config).layers] == [DynamicSlidingWindowLayer] * 2
    cache = roomy_cache(tiny_llama().config)
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer] * 2


def test_rows_of_recurrent_states_cannot_be_chosen() -> None:
    assert rows_can_be_chosen(roomy_cache(tiny_llama().config))
    assert rows_can_be_chosen(roomy_cache(MistralConfig(sliding_window=4)))
    assert not rows_can_be_chosen(roomy_cache(JambaConfig(num_hidden_layers=8)))


def test_choosing_rows_of_an_empty_layer_does_nothing() -> None:
    layer = RoomyLayer()
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0
