from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models.tiny import EOS, PAD, tiny_reward_model, tiny_tokenizer
from tpmm_pl.data.packing import pack_rows
from tpmm_pl.models.padding import separate_padding, use_padding
from tpmm_pl.models.reward import RewardScorer


def embedding(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings().get_parameter("weight")


def test_a_padding_token_of_its_own_stays() -> None:
    tokenizer = tiny_tokenizer()
    separate_padding(tokenizer)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", PAD)


@pytest.mark.parametrize("same", ["eos_token", "unk_token"])
def test_a_padding_token_that_is_another_is_replaced(same: str) -> None:
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.pad_token = getattr(tokenizer, same)
    separate_padding(tokenizer)
    # the vocabulary has a token of that name
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", PAD)


def test_a_padding_token_that_the_template_writes_is_replaced() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}<pad>"
    separate_padding(tokenizer)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 32)


def test_the_embedding_grows_only_where_there_is_no_spare_row() -> None:
    model, before = tiny_reward_model(), embedding(tiny_reward_model())
    use_padding(model, 31)
    assert embedding(model).shape == (32, 16)
    use_padding(model, 32)
    assert embedding(model).shape == (33, 16)
    assert torch.equal(embedding(model)[:32], before)
    assert model.config.vocab_size == 33
    assert model.config.pad_token_id == 32


def test_the_token_that_padded_before_gets_a_gradient() -> None:
    model = tiny_reward_model(pad_id=EOS)
    use_padding(model, PAD)
    RewardScorer(model).rows(pack_rows([((), (7, 8, EOS)), ((), (9,))])).sum().backward()
    gradient = embedding(model).grad
    assert gradient is not None
    assert gradient[EOS].any()
