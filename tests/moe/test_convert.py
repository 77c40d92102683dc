from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.moe.rewards import DENSE, IDS, MASK, reward_model, scores, seeded
from tpmm_pl.merging import linear_merge
from tpmm_pl.moe.convert import (
    consolidate,
    expert_groups,
    expert_sources,
    moe_layers,
    shared_coefficients,
    upcycle,
)
from tpmm_pl.moe.feed_forward import find_feed_forwards, fused_gate_last
from tpmm_pl.moe.routing import MoESettings, recorded_routing
from tpmm_pl.streaming import StreamedMerge
from tpmm_pl.types import InputError

every_architecture = pytest.mark.parametrize("name", DENSE)
SMALL = MoESettings(experts=4, active=3, shared=1)


def sharpen(model: nn.Module) -> None:
    """Give the routers opinions."""
    for number, layer in enumerate(moe_layers(model).values()):
        nn.init.normal_(layer.router.weight, generator=seeded(number))


def trained(name: str, settings: MoESettings = SMALL) -> PreTrainedModel:
    """An upcycled model whose experts went apart."""
    model = reward_model(name)
    upcycle(model, settings, generator=seeded())
    with torch.no_grad():
        for number, layer in enumerate(moe_layers(model).values()):
            for role, stack in enumerate(layer.stacks.values()):
                for parameter in stack.parameters():
                    noise = torch.randn(parameter.shape, generator=seeded(10 * number + role))
                    parameter.add_(noise, alpha=0.1)
    return model


def uniform(model: nn.Module, shared_coefficient: float) -> Tensor:
    layers = moe_layers(model)
    s = next(iter(layers.values())).settings
    return shared_coefficients(
        torch.full((len(layers), s.normal), 1 / s.normal), s.shared, shared_coefficient
    )


@every_architecture
@pytest.mark.parametrize("settings", [MoESettings(), MoESettings(6, 4, 2)])
def test_upcycled_model_computes_what_the_dense_one_does_under_router_noise(
    name: str, settings: MoESettings
) -> None:
    model = reward_model(name)
    expected = scores(model)
    upcycle(model, settings, generator=seeded())
    sharpen(model)
    with recorded_routing(model.train(), generator=seeded()) as routings:
        found = scores(model)
    assert len(routings) == (4 if name == "t5" else 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@every_architecture
def test_the_unnormalised_gate_computes_something_else(name: str) -> None:
    model = reward_model(name)
    expected = scores(model)
    upcycle(model, MoESettings(normalise=False), generator=seeded())
    assert (scores(model) - expected).abs().max() > 1e-3


@every_architecture
@pytest.mark.parametrize("shared_coefficient", [0.0, 0.5, 0.9])
def test_before_training_the_merge_is_the_dense_model_and_has_no_router(
    name: str, shared_coefficient: float
) -> None:
    model, dense = reward_model(name), reward_model(name)
    upcycle(model, SMALL, generator=seeded())
    layers = len(moe_layers(model))
    weights = torch.randn(layers, 3, generator=seeded(5)).softmax(-1)
    consolidate(model, shared_coefficients(weights, 1, shared_coefficient))
    classes = {path: type(module) for path, module in dense.named_modules()}
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert list(model.state_dict()) == list(dense.state_dict())
    for path, tensor in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[path], tensor, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores(model), scores(dense), atol=2e-6, rtol=0)


@every_architecture
def test_a_shared_coefficient_of_one_is_the_shared_expert_bit_for_bit(name: str) -> None:
    model = trained(name)
    shared = {path: tensor.clone() for path, tensor in expert_sources(model)[0].items()}
    consolidate(model, uniform(model, 1.0))
    for path, tensor in shared.items():
        assert torch.equal(model.state_dict()[path], tensor)


@every_architecture
def test_the_merge_is_the_linear_merge_of_the_experts(name: str) -> None:
    model = trained(name)
    groups, coefficients = expert_groups(model), uniform(model, 0.5)
    coefficients[1] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    sources = [{p: t.clone() for p, t in s.items()} for s in expert_sources(model)]
    consolidate(model, coefficients)
    for path, number in groups.items():
        states = [{path: source[path]} for source in sources]
        expected = linear_merge(states, coefficients[number])[path]
        assert torch.equal(model.state_dict()[path], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_sources_are_views_under_the_dense_models_names_that_a_streamed_merge_takes(
    name: str,
) -> None:
    model, dense = trained(name), reward_model(name)
    sources, groups = expert_sources(model), expert_groups(model)
    parameters = dict(dense.named_parameters())
    assert len(sources) == 4
    assert set(groups.values()) == {0, 1}
    assert list(sources[0]) == list(groups)
    merge = StreamedMerge({path: parameters[path] for path in groups}, sources, groups, 2)
    merge.write(uniform(model, 0.5))
    stack = next(iter(moe_layers(model).values())).stacks["up"].weight
    with torch.no_grad():
        stack[3].zero_()
    first = next(path for path, tensor in sources[3].items() if not tensor.any())
    assert groups[first] == 0, "nothing was copied"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_streamed_gradient_of_the_coefficients_equals_autograd_through_the_merge(name: str) -> None:
    model, dense = trained(name), reward_model(name)
    sources, groups = expert_sources(model), expert_groups(model)
    parameters = {path: p for path, p in dense.named_parameters() if path in groups}
    merge = StreamedMerge(parameters, sources, groups, 2)
    coefficients = uniform(model, 0.5).requires_grad_()
    merge.write(coefficients)
    with merge.gradient() as found:
        scores(dense).sum().backward()
    merged = {
        path: sum(c * s[path] for c, s in zip(coefficients[groups[path]], sources, strict=True))
        for path in groups
    }
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    output = torch.func.functional_call(dense, merged, (), inputs).logits.sum()
    (expected,) = torch.autograd.grad(output, coefficients)
    # known up to a constant a row, which no constraint on the row's sum lets through
    torch.testing.assert_close(found.float(), expected - expected[:, :1], atol=1e-4, rtol=1e-4)


def test_experts_train_and_the_merge_of_trained_experts_differs_from_each() -> None:
    model = reward_model("llama")
    upcycle(model, SMALL, generator=seeded())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for step in range(5):
        with recorded_routing(model, MASK, seeded(step)):
            loss = (scores(model) - torch.tensor([1.0, -1.0, 0.0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = next(iter(moe_layers(model).values())).stacks["up"].weight.detach()
    assert all(not torch.equal(weight[0], weight[e]) for e in range(1, 4))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert"])
def test_reinitialising_draws_a_share_of_the_units_of_routed_experts_only(name: str) -> None:
    model = reward_model(name)
    dense = {path: p.detach().clone() for path, p in model.named_parameters()}
    upcycle(model, MoESettings(4, 3, 1, reinitialise=0.25), generator=seeded())
    for path in expert_groups(model):
        shares = [(s[path] != dense[path]).float().mean().item() for s in expert_sources(model)]
        of_outputs = path.endswith(("mlp.c_proj.bias", "output.dense.bias"))
        assert shares == ([0, 0, 0, 0] if of_outputs else [0, 0.25, 0.25, 0.25]), path


def test_a_reinitialised_unit_is_the_same_in_every_matrix_and_another_in_every_expert() -> None:
    model, dense = reward_model("phi3"), reward_model("phi3")
    upcycle(model, MoESettings(4, 3, 1, reinitialise=0.25), generator=seeded())
    block = "model.layers.0.mlp."
    units = []
    for source in expert_sources(model)[1:]:
        up = (
            source[f"{block}gate_up_proj.weight"]
            != dense.state_dict()[f"{block}gate_up_proj.weight"]
        )
        down = source[f"{block}down_proj.weight"] != dense.state_dict()[f"{block}down_proj.weight"]
        gate_units, up_units = up.any(1).chunk(2)
        assert torch.equal(gate_units, up_units)
        assert torch.equal(gate_units, down.any(0))
        units.append(gate_units)
    assert not torch.equal(units[0], units[1])


def test_reinitialised_weights_have_the_mean_and_the_spread_of_those_they_replace() -> None:
    mlp = Plain(400, 400, nn.GELU())
    nn.init.normal_(mlp.up.weight, 0.5, 2.0, generator=seeded())
    model = stack_of(Block(mlp))
    upcycle(model, MoESettings(3, 2, 1, reinitialise=0.5), generator=seeded(1))
    weight = next(iter(moe_layers(model).values())).stacks["up"].weight.detach()
    new = weight[1][(weight[1] != weight[0]).any(1)]
    assert new.shape == (200, 400)
    assert new.mean().item() == pytest.approx(0.5, abs=4 * 2 / 80_000**0.5)
    assert new.std().item() == pytest.approx(2.0, rel=0.01)


class FusedLast(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up(x).chunk(2, -1)
        out: Tensor = self.down(up * self.act(gate))
        return out


class Plain(nn.Module):
    def __init__(self, width: int, inner: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down = nn.Linear(inner, width)
        self.up = nn.Linear(width, inner)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


def stack_of(*blocks: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


@pytest.mark.parametrize(
    "mlp", [FusedLast(16, 24), Plain(16, 24, torch.tanh), Plain(16, 16, nn.ReLU())]
)
def test_other_orders_functions_and_square_layers_are_found_by_what_they_compute(
    mlp: nn.Module,
) -> None:
    x = torch.randn(2, 5, 16, generator=seeded())
    expected = mlp(x)
    model = stack_of(Block(mlp))
    (found,) = find_feed_forwards(model).values()
    assert (found.compute is fused_gate_last) == isinstance(mlp, FusedLast)
    assert found.linears == {"up": "mlp.up", "down": "mlp.down"}
    upcycle(model, MoESettings(), generator=seeded())
    (layer,) = moe_layers(model).values()
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_the_gate_is_told_apart_in_half_precision_where_weights_are_small() -> None:
    # activations are straight near 0: there both orders agree to the 8 bits of bfloat16
    mlp = FusedLast(16, 24).bfloat16()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.01, generator=seeded())
    (found,) = find_feed_forwards(stack_of(Block(mlp))).values()
    assert found.compute is fused_gate_last


def test_a_module_that_computes_more_than_its_parts_is_no_feed_forward_layer() -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    with pytest.raises(InputError, match=r"no feed-forward layer found in .*mlp: Scaled"):
        find_feed_forwards(stack_of(Block(Scaled(16, 24, nn.GELU()))))


def test_finding_leaves_modes_and_modules_as_they_were() -> None:
    model = reward_model("bert").train()
    model.bert.encoder.layer[0].output.dropout.eval()
    before = [(path, id(module), module.training) for path, module in model.named_modules()]
    find_feed_forwards(model)
    assert [(path, id(m), m.training) for path, m in model.named_modules()] == before


def test_inline_feed_forwards_are_refused_naming_the_modules_looked_at() -> None:
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.0 \(.*fc1: Linear, fc2: Linear"):
        upcycle(reward_model("opt"), SMALL, generator=seeded())


@pytest.mark.parametrize("make", [lambda: reward_model("mixtral"), lambda: trained("llama")])
def test_mixtures_are_refused_naming_the_stacked_weights(
    make: Callable[[], PreTrainedModel],
) -> None:
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp.* stacks several matrices"):
        upcycle(make(), SMALL, generator=seeded())


def test_a_list_of_experts_in_a_block_is_refused() -> None:
    experts = nn.ModuleList([Plain(16, 24, nn.GELU()) for _ in range(2)])
    with pytest.raises(InputError, match=r"has 2 feed-forward layers \(layers\.0\.mlp\.0, "):
        find_feed_forwards(stack_of(Block(experts)))


def test_a_block_without_feed_forward_among_others_is_refused_before_anything_changes() -> None:
    model = stack_of(Block(Plain(16, 24, nn.GELU())), Block(nn.Linear(16, 16)))
    with pytest.raises(InputError, match=r"layers\.1 \(mlp: Linear\)"):
        upcycle(model, SMALL, generator=seeded())
    assert not moe_layers(model)


def test_coefficients_of_another_shape_and_dense_models_are_refused() -> None:
    model = trained("llama")
    with pytest.raises(ValueError, match=r"coefficients are \(1, 4\), the model needs \(2, 4\)"):
        consolidate(model, torch.full((1, 4), 0.25))
    dense = reward_model("llama")
    for call in (expert_sources, expert_groups, lambda m: consolidate(m, torch.ones(2, 4))):
        with pytest.raises(
            InputError, match="no experts to consolidate; make some by `tpmm upcycle`"
        ):
            call(dense)


def test_frozen_weights_stay_frozen_there_and_back() -> None:
    model = reward_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    upcycle(model, SMALL, generator=seeded())
    layers = list(moe_layers(model).values())
    assert [layer.stacks["up"].weight.requires_grad for layer in layers] == [False, True]
    consolidate(model, uniform(model, 0.5))
    required = [block.mlp.up_proj.weight.requires_grad for block in model.model.layers]
    assert required == [False, True]


def test_shared_coefficients_equal_the_numbers_worked_out_by_hand() -> None:
    rows = shared_coefficients(torch.tensor([[0.25, 0.75]]), 2, 0.4)
    torch.testing.assert_close(rows, torch.tensor([[0.2, 0.2, 0.15, 0.45]]), atol=1e-7, rtol=0)
