from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.moe.rewards import reward_model, seeded
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.layer import SparseMoE, grouped_product
from tpmm_pl.moe.routing import MoESettings

X = torch.randn(2, 9, 16, generator=seeded())


def trained(name: str, settings: MoESettings) -> SparseMoE:
    """A layer whose experts differ and whose router has opinions."""
    model = reward_model(name)
    upcycle(model, settings, generator=seeded())
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.normal_(0, 0.4, generator=seeded(number))
    return layer


def every_expert_on_every_token(layer: SparseMoE, x: Tensor) -> Tensor:
    """The formula as it is written, with the gates as a dense matrix."""
    s = layer.settings
    rows = x.reshape(-1, x.shape[-1])
    p = (rows @ layer.router.weight.t()).softmax(-1)
    kept = p.topk(s.top_k).indices
    chosen = torch.zeros_like(p).scatter(-1, kept, 1.0)
    highest = p.max(-1, keepdim=True).values
    relative = (p.exp() * chosen) / (p.exp() * chosen).sum(-1, keepdim=True)
    routed = highest * relative if s.normalise else p * chosen
    gates = torch.cat([((1 - highest) / s.shared).expand(-1, s.shared), routed], dim=-1)

    def linear(role: str, expert: int, z: Tensor) -> Tensor:
        stack = layer.stacks[role]
        weight = stack.weight[expert] if stack.transposed else stack.weight[expert].t()
        return z @ weight + (0 if stack.bias is None else stack.bias[expert])

    total = torch.zeros_like(rows)
    for e in range(s.experts):
        if "gate" in layer.stacks:
            hidden = layer.activation(linear("gate", e, rows)) * linear("up", e, rows)
        elif layer.stacks["up"].weight.shape[1] == 2 * layer.stacks["down"].width:
            first, second = linear("up", e, rows).chunk(2, -1)
            hidden = layer.activation(first) * second
        else:
            hidden = layer.activation(linear("up", e, rows))
        total = total + gates[:, e : e + 1] * linear("down", e, hidden)
    return total.view(x.shape)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("experts", "active", "shared"), [(8, 6, 1), (5, 3, 1), (6, 4, 2), (4, 4, 1)]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_grouped_forward_and_gradients_equal_every_expert_on_every_token(
    name: str, experts: int, active: int, shared: int, normalise: bool
) -> None:
    settings = MoESettings(experts, active, shared, normalise=normalise, noise=False)
    layer = trained(name, settings)
    weight = torch.randn(X.shape, generator=seeded(9))
    results = []
    for function in (layer, lambda x: every_expert_on_every_token(layer, x)):
        x = X.clone().requires_grad_()
        y = function(x)
        gradients = torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])
        results.append((y, *gradients))
    for found, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("active", [2, 3, 5])
def test_expert_rows_computed_are_tokens_times_active(active: int) -> None:
    layer = trained("llama", MoESettings(5, active, 1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(X)
    tokens, width, inner = 18, 16, 32
    router = 2 * tokens * width * layer.settings.normal
    assert counter.get_total_flops() == tokens * active * 3 * 2 * width * inner + router


def test_an_expert_that_no_token_goes_to_has_no_gradient_and_no_say() -> None:
    layer = trained("gpt2", MoESettings(5, 2, 1, noise=False))
    x = X.abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0  # positive rows: all tokens to routed expert 2
    assert isinstance(layer.activation, nn.Module)
    calls: list[int] = []
    handle = layer.activation.register_forward_hook(lambda *_: calls.append(1))
    y = layer(x)
    handle.remove()
    assert len(calls) == 2, "the shared expert and the one that is used"
    y.sum().backward()
    for stack in layer.stacks.values():
        for parameter in stack.parameters():
            assert parameter.grad is not None
            used = [bool(gradient.any()) for gradient in parameter.grad]
            assert used == [True, False, False, True, False]
    with torch.no_grad():
        for stack in layer.stacks.values():
            stack.weight[[1, 2, 4]] = float("nan")
        assert torch.equal(layer(x), y)


def test_padding_free_rows_and_batches_give_the_same_output() -> None:
    layer = trained("llama", MoESettings(5, 3, 1))
    torch.testing.assert_close(layer(X.view(18, 16)), layer(X).view(18, 16), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_computes_in_bfloat16_but_routes_in_float32(name: str) -> None:
    layer = trained(name, MoESettings(5, 3, 1, noise=False))
    expected = layer(X)
    kept = layer.router(X).kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(X)
        assert torch.equal(layer.router(X).kept, kept)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.02, "a few roundings to 8 bits"
    found.float().sum().backward()
    assert all(p.grad is not None for p in layer.stacks["up"].parameters())


def test_a_copy_is_a_layer_of_its_own() -> None:
    layer = trained("gpt2", MoESettings(5, 3, 1))
    copy = deepcopy(layer)
    assert torch.equal(copy(X), layer(X))
    assert copy.replaced.modules["mlp"] is not layer.replaced.modules["mlp"]
    with torch.no_grad():
        copy.stacks["down"].weight.zero_()
    assert not torch.equal(copy(X), layer(X))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_grouped_kernel_computes_what_a_product_a_group_does(transposed: bool) -> None:
    sizes = torch.tensor([4, 0, 6])
    x = torch.randn(10, 16, generator=seeded(), requires_grad=True)
    stack = torch.randn(3, 16, 32, generator=seeded(1))
    weight = (stack if transposed else stack.mT.contiguous()).requires_grad_()
    bias = torch.randn(3, 32, generator=seeded(2), requires_grad=True)
    upstream = torch.randn(10, 32, generator=seeded(3))
    maps = weight if transposed else weight.mT
    groups = zip(x.split(sizes.tolist()), maps, bias, strict=True)
    results = [
        (y, *torch.autograd.grad((y * upstream).sum(), [x, weight, bias], retain_graph=True))
        for y in (
            grouped_product(x, maps, bias, sizes),
            torch.cat([rows @ w + b for rows, w, b in groups]),
        )
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_layer_restores_no_weights_of_the_dense_layer_it_holds_on_to() -> None:
    layer = trained("llama", MoESettings(5, 3, 1))
    for module in layer.replaced.modules.values():
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert isinstance(module, nn.Module)
    assert not [name for name in layer.state_dict() if "mlp" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_grouped_kernel_agrees_with_float32_on_an_accelerator(name: str) -> None:
    layer = trained(name, MoESettings(5, 3, 1, noise=False))
    expected = layer(X)
    gradients = torch.autograd.grad(expected.sum(), list(layer.parameters()))
    layer.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = layer(X.cuda())
    assert found.dtype == torch.bfloat16
    again = torch.autograd.grad(found.float().sum(), list(layer.parameters()))
    for value, exact in zip((found, *again), (expected, *gradients), strict=True):
        error = (value.float().cpu() - exact).norm() / exact.norm()
        assert error < 0.03, "a few roundings to 8 bits"
