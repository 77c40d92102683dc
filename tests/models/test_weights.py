from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from tests.models.tiny import tiny_gpt2, tiny_llama
from tests.models.trajectories import (
    IDS,
    MERGE,
    WEIGHTS,
    Factory,
    adapted,
    adapter_trajectory,
    assert_computes,
    base_of,
    both_models,
    dense_states,
    dense_trajectory,
    logits,
    products,
    randomise,
)
from tpmm_pl.merging import assign_groups, grouped_merge, linear_merge
from tpmm_pl.models.weights import (
    become,
    materialise,
    policy_state,
    save_policy,
    streamed_merge,
)
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Recipe


@both_models
@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("restore", [materialise, become])
def test_a_snapshot_comes_back_bit_for_bit(
    factory: Factory, kept: int, restore: Callable[..., Any], tmp_path: Path
) -> None:
    store = dense_trajectory(factory, tmp_path)
    policy = factory(seed=9)
    restore(policy, store, Recipe("last", (kept,)))
    expected = factory(seed=kept).state_dict()
    assert expected.keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@both_models
def test_a_materialised_recipe_is_the_linear_merge(factory: Factory, tmp_path: Path) -> None:
    store, policy = dense_trajectory(factory, tmp_path), factory(seed=9)
    materialise(policy, store, MERGE)
    states = [dict(factory(seed=seed).named_parameters()) for seed in range(3)]
    expected = linear_merge(states, torch.tensor(WEIGHTS, dtype=torch.float64))
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert become(factory(), store, MERGE) == 0.0


def test_every_group_of_a_recipe_uses_its_own_coefficients(tmp_path: Path) -> None:
    store, policy = dense_trajectory(tiny_llama, tmp_path), tiny_llama(seed=9)
    names = [name for name, _ in policy.named_parameters()]
    groups, group_of = assign_groups(names, "layer")
    rows = ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.2, 0.3, 0.5), (0.0, 0.0, 1.0))
    materialise(policy, store, Recipe("learned", (0, 1, 2), rows, "layer", groups))
    states = [dict(tiny_llama(seed=seed).named_parameters()) for seed in range(3)]
    expected = grouped_merge(states, torch.tensor(rows), group_of)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-7, rtol=0)
    assert torch.equal(policy.get_parameter(names[0]), states[0][names[0]])
    assert torch.equal(policy.get_parameter("lm_head.weight"), states[2]["lm_head.weight"])


def test_tied_embeddings_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    store, policy = dense_trajectory(tiny_gpt2, tmp_path), tiny_gpt2(seed=9)
    assert "lm_head.weight" not in store.source(0)
    materialise(policy, store, MERGE)
    assert policy.lm_head.weight is policy.transformer.wte.weight


def test_buffers_are_those_of_the_newest_snapshot(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    policy = nn.BatchNorm1d(2)
    mean = policy.get_buffer("running_mean")
    for index in range(2):
        mean.fill_(index)
        save_policy(policy, store, index)
    mean.fill_(7)
    materialise(policy, store, Recipe("uniform", (0, 1), ((0.5, 0.5),)))
    assert mean.tolist() == [1.0, 1.0]


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path) -> None:
    store = dense_trajectory(tiny_llama, tmp_path)
    with pytest.raises(
        InputError, match=r"does not fit the policy: round 0 has an extra .*; use the model the"
    ):
        materialise(tiny_gpt2(), store, MERGE)
    smaller = nn.Linear(2, 2)
    save_policy(nn.Linear(3, 2), store, 3)
    with pytest.raises(InputError, match=r"tensor weight has shape \(2, 3\), not \(2, 2\)"):
        materialise(smaller, store, Recipe("last", (3,)))


@pytest.mark.parametrize("grouping", ["layer", "block", "tensor"])
def test_grouped_coefficients_of_adapters_are_those_of_their_products(
    grouping: str, tmp_path: Path
) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    merge, groups = streamed_merge(policy, store, (0, 1, 2), grouping)
    rows = torch.rand(len(groups), 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    merge.write(rows)
    dense = base_of(tiny_llama)
    states = dense_states(store)
    for name, parameter in dense.named_parameters():
        factor = f"base_model.model.{name}".replace(".weight", ".lora_A.merge.weight")
        row = rows[merge.group_of[factor]] if factor in merge.group_of else torch.ones(3) / 3
        parameter.data = sum(c * s[name].detach() for c, s in zip(row, states, strict=True))
    assert_computes(policy, logits(dense))


def test_one_snapshot_restores_the_adapter_bit_for_bit_and_leaves_one(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    names = [name for name, _ in policy.named_parameters()]
    materialise(policy, store, MERGE)
    assert policy.active_adapter == "merge"
    materialise(policy, store, Recipe("last", (1,)))
    assert list(policy.peft_config) == ["default"]
    assert policy.active_adapter == "default"
    assert [name for name, _ in policy.named_parameters()] == names
    for name, tensor in policy_state(policy).items():
        assert torch.equal(tensor, store.source(1)[name]), name
    randomise(policy, seed=1)
    for name, tensor in policy_state(policy).items():
        assert torch.equal(tensor, store.source(1)[name]), name
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_buffers_of_the_model_below_do_not_stand_in_the_way_of_adapters(tmp_path: Path) -> None:
    policy = adapted()
    policy.get_base_model().register_buffer("steps", torch.tensor([7]))
    store = adapter_trajectory(policy, tmp_path)
    materialise(policy, store, MERGE)
    assert policy.get_base_model().get_buffer("steps").tolist() == [7]


@pytest.mark.parametrize("rank", [2, 5])
def test_to_become_a_merge_of_adapters_keeps_the_best_of_the_rank(
    rank: int, tmp_path: Path
) -> None:
    policy = adapted(rank=rank)
    store = adapter_trajectory(policy, tmp_path)
    sums: dict[str, Tensor] = {}
    for index, weight in enumerate(WEIGHTS):
        materialise(policy, store, Recipe("last", (index,)))
        for name, product in products(policy).items():
            sums[name] = sums.get(name, 0) + weight * product.double()
    error = become(policy, store, MERGE)

    lost = total = 0.0
    for name, product in products(policy).items():
        left, singular, right = torch.linalg.svd(sums[name], full_matrices=False)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        torch.testing.assert_close(product, best.float(), atol=1e-5, rtol=0)
        lost += float(singular[rank:].square().sum())
        total += float(singular.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert 0.1 < error < 1
    assert list(policy.peft_config) == ["default"]
    assert all(p.shape[0] == rank for name, p in policy.named_parameters() if "lora_A" in name)


def test_to_become_one_adapter_or_a_merge_of_equal_ones_loses_nothing(tmp_path: Path) -> None:
    policy = adapted()
    store = TrajectoryStore(tmp_path)
    randomise(policy, seed=0)
    for index in range(3):
        save_policy(policy, store, index)
    before = logits(policy)
    assert become(policy, store, Recipe("last", (1,))) == 0.0
    assert torch.equal(logits(policy), before)
    assert become(policy, store, MERGE) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits(policy), before, atol=1e-5, rtol=1e-5)


def test_a_rank_beyond_the_layers_width_loses_nothing(tmp_path: Path) -> None:
    # the keys of the tiny model have 8 outputs
    policy = adapted(rank=12)
    store = adapter_trajectory(policy, tmp_path, rounds=2)
    recipe = Recipe("uniform", (0, 1), ((0.5, 0.5),))
    materialise(policy, store, recipe)
    merged = logits(policy)
    assert become(policy, store, recipe) < 1
    keys = {name: p for name, p in products(policy).items() if "k_proj" in name}
    states = dense_states(store)
    for name, product in keys.items():
        plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        start = base_of(tiny_llama).get_parameter(plain).detach()
        change = (states[0][plain] + states[1][plain]).detach() / 2 - start
        torch.testing.assert_close(product * 3 / 12, change, atol=1e-5, rtol=0)
    assert merged.isfinite().all()


def test_a_policy_that_becomes_its_untrained_start_can_still_train(tmp_path: Path) -> None:
    policy = adapted()
    store = TrajectoryStore(tmp_path)
    for index in range(2):
        save_policy(policy, store, index)
    assert become(policy, store, Recipe("ema", (0, 1), ((0.4, 0.6),))) == 0.0
    torch.testing.assert_close(logits(policy), logits(base_of(tiny_llama)))
    policy(IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if "lora_B" in n}
    assert gradients
    assert all(g is not None and g.abs().max() > 1e-6 for g in gradients.values())


@both_models
def test_an_adapters_folder_is_one_that_peft_loads(factory: Factory, tmp_path: Path) -> None:
    policy = adapted(factory)
    store = adapter_trajectory(policy, tmp_path)
    loaded = PeftModel.from_pretrained(base_of(factory), store.folder(2) / "adapter")
    assert torch.equal(logits(loaded), logits(policy))
    assert store.record(2).snapshot == "round_002/adapter/adapter_model.safetensors"


def test_a_snapshot_of_an_adapter_holds_the_adapter_alone(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    assert all("lora_" in name for name in store.source(0))
    # 7 adapted layers in each of 2 blocks, two factors each
    assert len(store.source(0)) == 28


@both_models
@pytest.mark.parametrize("grouping", ["model", "layer"])
def test_the_coefficients_gradient_equals_autograd_through_the_dense_sum_of_products(
    factory: Factory, grouping: str, tmp_path: Path
) -> None:
    policy = adapted(factory)
    store = adapter_trajectory(policy, tmp_path)
    merge, groups = streamed_merge(policy, store, (0, 1, 2), grouping)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(groups), 3, dtype=torch.float64, generator=generator)
    coefficients = weights.requires_grad_().softmax(-1)
    merge.write(coefficients)
    with merge.gradient() as gradient:
        policy(IDS, labels=IDS).loss.backward()
    (ours,) = torch.autograd.grad(coefficients, weights, gradient, retain_graph=True)

    rows = {
        name.removeprefix("base_model.model.").replace(".lora_A.merge", ""): row
        for name, row in merge.group_of.items()
        if "lora_A" in name
    }
    states = dense_states(store, factory)
    merged = {
        name: sum(
            c * s[name].detach().double() for c, s in zip(coefficients[row], states, strict=True)
        )
        for name, row in rows.items()
    }
    model = base_of(factory).double()
    loss = functional_call(model, merged, (IDS,), {"labels": IDS}).loss
    (expected,) = torch.autograd.grad(loss, weights)
    assert expected.norm() > 1e-3
    assert float((ours - expected).norm() / expected.norm()) < 1e-4
    assert all(parameter.grad is None for parameter in policy.parameters())
