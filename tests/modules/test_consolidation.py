from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from tests.models.tiny import EOS, tiny_reward_model
from tpmm_pl.data.batching import collate
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.modules.consolidation import ExpertFusion, mean_gates, ranking
from tpmm_pl.moe.convert import consolidate, moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError, Pair, PairBatch, Rewards

# a training step outside of a fit has nobody to log to
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

SETTINGS = MoESettings(experts=4, active=3)


def specialised(seed: int = 0) -> torch.nn.Module:
    """A mixture whose experts are far apart, as long training would leave them."""
    model: torch.nn.Module = tiny_reward_model()
    for parameter in model.parameters():
        parameter.data *= 3
    upcycle(model, SETTINGS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    return model


def pairs(seed: int, count: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 32, (length,), generator=generator).tolist())

    return [
        Pair(f"p{i}", "", "", "", tokens(2), (*tokens(2 + i % 4), EOS), (*tokens(3), EOS))
        for i in range(count)
    ]


def believed(teacher: torch.nn.Module, made: list[Pair]) -> PairBatch:
    """Both orders of every pair, weighted by what the teacher believes: its d is the optimum."""
    batch = collate(made)
    with torch.no_grad():
        rewards = RewardScorer(teacher)(batch)
        belief = (rewards.chosen - rewards.rejected).sigmoid()
    both = collate([*made, *[_swapped(pair) for pair in made]])
    both.weight = torch.cat([belief, 1 - belief])
    return both


def _swapped(pair: Pair) -> Pair:
    return replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def loss(model: torch.nn.Module, batch: PairBatch) -> float:
    with torch.no_grad():
        rewards = RewardScorer(model)(batch)
        losses = bradley_terry_loss(rewards.chosen, rewards.rejected)
    return float((losses * batch.weight).mean())


def fit(fusion: ExpertFusion, batch: PairBatch, steps: int) -> Tensor:
    fit_with_fabric(
        Fabric(accelerator="cpu", devices=1), fusion, [[batch]] * steps, title="coefficients"
    )
    fusion.on_train_epoch_end()
    return fusion.coefficients().detach()


TRUTH = torch.tensor([[0.5, 0.35, 0.1, 0.05], [0.5, 0.05, 0.3, 0.15]])


def test_known_coefficients_are_recovered() -> None:
    teacher = deepcopy(specialised())
    consolidate(teacher, TRUTH)
    student = specialised()
    fusion = ExpertFusion(shared_coefficient=0.5).bind_experts(student)
    batch = believed(teacher, pairs(1, 200))
    before = loss(student, batch)
    found = fit(fusion, batch, 400)
    torch.testing.assert_close(found, TRUTH, atol=0.02, rtol=0)
    assert loss(student, batch) < before
    # and on pairs that nothing was learned on
    unseen = believed(teacher, pairs(2, 200))
    uniform = ExpertFusion(shared_coefficient=0.5).bind_experts(specialised())
    assert loss(student, unseen) < loss(uniform.reward, unseen)


def test_a_fresh_fusion_is_the_plain_average_of_the_routed_experts() -> None:
    fusion = ExpertFusion(shared_coefficient=0.25).bind_experts(specialised())
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).expand(2, 4)
    torch.testing.assert_close(fusion.coefficients(), expected, atol=1e-6, rtol=0)
    expected_model = specialised()
    consolidate(expected_model, expected)
    for name, tensor in expected_model.state_dict().items():
        torch.testing.assert_close(fusion.reward.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_all_weight_on_the_shared_expert_leaves_nothing_to_learn() -> None:
    model = specialised()
    shared = {
        name: stack.weight[0].clone()
        for layer, moe in moe_layers(model).items()
        for role, stack in moe.stacks.items()
        for name in [f"{layer}.{role}_proj.weight"]
    }
    fusion = ExpertFusion(shared_coefficient=1.0).bind_experts(model)
    for name, weight in shared.items():
        assert torch.equal(fusion.reward.state_dict()[name], weight)


def test_measured_gates_are_where_a_fit_starts() -> None:
    model = specialised()
    gates = mean_gates(model, [collate(pairs(1, 20))])
    assert gates.shape == (2, 3)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2).double())
    fusion = ExpertFusion(shared_coefficient=0.5).bind_experts(model, gates)
    expected = torch.cat([torch.full((2, 1), 0.5), 0.5 * gates.float()], dim=1)
    torch.testing.assert_close(fusion.coefficients().detach(), expected, atol=1e-6, rtol=0)


def test_mean_gates_weigh_batches_by_their_tokens_and_skip_padding() -> None:
    made = pairs(1, 12)
    together = mean_gates(specialised(), [collate(made)])
    apart = mean_gates(specialised(), [collate([pair]) for pair in made])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_only_the_experts_are_learned_and_no_gradient_is_left() -> None:
    model = specialised()
    embedding = model.get_parameter("model.embed_tokens.weight").detach().clone()
    fusion = ExpertFusion().bind_experts(model)
    fit(fusion, collate(pairs(1, 8)), 2)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), embedding)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(dict(fusion.named_parameters())) == ["weights"]


def test_a_merge_that_did_not_move_is_told() -> None:
    fusion = ExpertFusion(lr=1e-6).bind_experts(specialised())
    fit(fusion, collate(pairs(1, 8)), 2)
    assert "all 3 coefficients are within 1 % of uniform" in str(fusion.warning())


def test_a_collapse_names_the_expert() -> None:
    fusion = ExpertFusion().bind_experts(specialised())
    fusion.weights.data = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    assert "collapsed to the expert 2" in str(fusion.warning())


def test_a_margin_of_a_pair_counts_as_in_training() -> None:
    batch = collate(pairs(1, 2))
    batch.margin = torch.tensor([0.0, 2.0])
    rewards = Rewards(torch.tensor([1.0, 3.0]), torch.zeros(2))
    # log(1 + exp(-1)) both times
    torch.testing.assert_close(ranking(rewards, batch, 1.0), torch.full((2,), 0.3132617))


def test_a_dense_model_has_nothing_to_consolidate() -> None:
    with pytest.raises(InputError, match="no experts to consolidate; make some by `tpmm upcycle`"):
        ExpertFusion().bind_experts(tiny_reward_model())


def test_the_shared_coefficient_is_a_share() -> None:
    with pytest.raises(InputError, match=r"shared_coefficient is 1.5; it must be in \[0, 1\]"):
        ExpertFusion(shared_coefficient=1.5)
