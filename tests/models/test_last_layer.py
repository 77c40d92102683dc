import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from tests.models.tiny import tiny_gpt2, tiny_llama
from tpmm_pl.models.last_layer import last_feed_forward, only_at


def tiny_opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            ffn_dim=32,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )


def test_it_is_the_mlp_of_the_last_block() -> None:
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    assert last_feed_forward(llama) is llama.model.layers[-1].mlp
    assert last_feed_forward(gpt2) is gpt2.transformer.h[-1].mlp


def test_a_block_whose_layers_stand_apart_has_none() -> None:
    assert last_feed_forward(tiny_opt()) is None
    assert last_feed_forward(nn.Linear(2, 2)) is None


class Mixing(nn.Module):
    """As large as a feed-forward layer, but tokens look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x + x.mean(1, keepdim=True)))  # type: ignore[no-any-return]


def test_what_mixes_tokens_is_passed_over() -> None:
    llama = tiny_llama()
    llama.model.layers[-1].mlp = Mixing()
    assert last_feed_forward(llama) is None


def test_other_tokens_cost_nothing_and_change_nothing() -> None:
    mlp = tiny_llama().model.layers[-1].mlp
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.tensor([1, 4])
    seen: list[int] = []
    mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    plain = mlp(x)[:, tokens]
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    with only_at(mlp, tokens):
        narrowed = mlp(x)
    assert narrowed.shape == x.shape
    (found,) = torch.autograd.grad(narrowed[:, tokens].square().sum(), x)
    torch.testing.assert_close(narrowed[:, tokens], plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    mlp(x)
    assert seen == [6, 2, 6]


@pytest.mark.parametrize("tokens", [[2], [0, 0, 3]])
def test_a_token_asked_for_twice_keeps_its_gradient(tokens: list[int]) -> None:
    mlp = tiny_llama().model.layers[-1].mlp
    x = torch.randn(1, 6, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x)[:, tokens].sum(), x)
    with only_at(mlp, torch.tensor(tokens)):
        (found,) = torch.autograd.grad(mlp(x)[:, tokens].sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
