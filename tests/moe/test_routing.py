from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.moe.rewards import IDS, MASK, reward_model, scores, seeded
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import (
    Gates,
    MoESettings,
    Router,
    Routing,
    balance_loss,
    expected_load,
    gate,
    joined,
    recorded_routing,
    squared_variation,
    summarise,
)
from tpmm_pl.types import InputError

SMALL = MoESettings(experts=5, active=3, shared=1)


def total(gates: Gates, shared: int) -> Tensor:
    return shared * gates.shared + gates.routed.sum(-1)


def router(settings: MoESettings = SMALL, *, spread: float = 1.0) -> Router:
    made = Router(16, settings, generator=seeded(1))
    nn.init.normal_(made.weight, std=spread, generator=seeded(2))
    return made


@pytest.mark.parametrize(
    ("experts", "active", "shared"), [(8, 6, 1), (5, 3, 1), (6, 4, 2), (4, 4, 1)]
)
def test_normalised_gates_sum_to_one_for_any_router(experts: int, active: int, shared: int) -> None:
    settings = MoESettings(experts, active, shared)
    logits = 5 * torch.randn(50, settings.normal, generator=seeded())
    gates = gate(logits, settings.top_k, shared=shared)
    torch.testing.assert_close(total(gates, shared), torch.ones(50), atol=1e-6, rtol=0)


def test_unnormalised_gates_of_a_uniform_router_sum_to_eleven_sevenths() -> None:
    gates = gate(torch.zeros(1, 7), 5, normalise=False)
    assert total(gates, 1).item() == pytest.approx(11 / 7, abs=1e-6)


def test_gate_equals_the_numbers_worked_out_by_hand() -> None:
    # p = (0.5, 0.3, 0.2); kept 0.5 and 0.3; softmax of those: 1 / (1 + e^-0.2) = 0.549834
    gates = gate(torch.tensor([[0.5, 0.3, 0.2]]).log(), 2, shared=2)
    torch.testing.assert_close(gates.shared, torch.tensor([0.25]), atol=1e-6, rtol=0)
    expected = torch.tensor([[0.5 * 0.549834, 0.5 * 0.450166]])
    torch.testing.assert_close(gates.routed, expected, atol=1e-6, rtol=0)
    assert gates.kept.tolist() == [[0, 1]]
    plain = gate(torch.tensor([[0.5, 0.3, 0.2]]).log(), 2, normalise=False)
    torch.testing.assert_close(plain.routed, torch.tensor([[0.5, 0.3]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.shared, torch.tensor([0.5]), atol=1e-6, rtol=0)


def test_balance_loss_equals_the_numbers_worked_out_by_hand() -> None:
    # mean 2, variance 2/3: 1/6; mean 1, variance 2: 2
    importance, load = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, 0.0])
    blank = torch.zeros(())
    routing = Routing(importance, load, load, blank, load, blank)
    assert balance_loss(routing).item() == pytest.approx(1 / 6 + 2, abs=1e-6)


def test_variation_is_zero_when_even_and_r_minus_one_when_all_is_on_one() -> None:
    assert squared_variation(torch.full((7,), 3.0)).item() == 0
    assert squared_variation(torch.tensor([0.0, 0, 0, 5, 0, 0, 0])).item() == pytest.approx(6)
    assert squared_variation(torch.zeros(7)).isfinite()


def test_expected_load_is_the_frequency_with_which_redrawn_noise_keeps_an_expert() -> None:
    clean = torch.tensor([[0.3, 0.1, -0.2, 0.0]])
    spread = torch.tensor([[0.5, 0.2, 0.4, 0.3]])
    noisy = clean + spread * torch.tensor([[0.2, -0.5, 1.0, 0.3]])
    found = expected_load(clean, noisy, spread, noisy.topk(2).indices)
    draws = 200_000
    for expert in range(4):
        again = noisy.repeat(draws, 1)
        fresh = torch.randn(draws, generator=seeded(expert))
        again[:, expert] = clean[0, expert] + spread[0, expert] * fresh
        kept = (again.topk(2).indices == expert).any(-1).float().mean()
        # four standard errors of a frequency
        assert found[0, expert].item() == pytest.approx(kept.item(), abs=4 * (0.25 / draws) ** 0.5)


def test_statistics_equal_those_worked_out_token_by_token() -> None:
    logits = torch.randn(6, 4, generator=seeded(3))
    seen = torch.tensor([1, 1, 0, 1, 1, 0])
    gates = gate(logits, 2)
    found = summarise(gates, None, seen, SMALL)
    importance, counts, entropy, shared = torch.zeros(4), torch.zeros(4), 0.0, 0.0
    for token in (0, 1, 3, 4):
        p = logits[token].softmax(-1)
        entropy += float(-(p * p.log()).sum()) / 4
        shared += float(1 - p.max()) / 4
        for expert, weight in zip(gates.kept[token], gates.routed[token], strict=True):
            importance[expert] += weight
            counts[expert] += 1
    torch.testing.assert_close(found.importance, importance, atol=1e-6, rtol=0)
    assert torch.equal(found.counts, counts.long())
    assert torch.equal(found.load, counts)
    assert found.gate_entropy.item() == pytest.approx(entropy, abs=1e-6)
    expected = torch.cat([torch.tensor([shared]), importance / 4])
    torch.testing.assert_close(found.weight, expected, atol=1e-6, rtol=0)
    assert found.tokens.item() == 4


def test_weights_of_all_experts_sum_to_one_and_a_uniform_router_has_the_highest_entropy() -> None:
    made = router(MoESettings(experts=6, active=4, shared=2, noise=False), spread=0.0)
    with recorded_routing(nn.ModuleDict({"router": made})) as routings:
        made(torch.randn(2, 9, 16, generator=seeded()))
    (routing,) = routings.values()
    assert routing.weight.sum().item() == pytest.approx(1, abs=1e-6)
    assert routing.gate_entropy.item() == pytest.approx(log(4), abs=1e-6)
    assert routing.counts.sum().item() == 2 * 9 * 2


def test_noise_is_drawn_in_training_only() -> None:
    made, x = router(), torch.randn(5, 16, generator=seeded())
    quiet = made.eval()(x).probabilities
    assert torch.equal(quiet, made(x).probabilities)
    assert torch.equal(quiet, (x @ made.weight.t()).softmax(-1))
    assert not torch.equal(made.train()(x).probabilities, quiet)


def test_noise_starts_with_a_spread_of_softplus_of_zero_and_the_floor() -> None:
    made, x = router(spread=0.0), torch.randn(50_000, 16, generator=seeded())
    logits = made.train()(x).probabilities.log()
    # centred over R experts, the variance of independent noise shrinks by (R - 1) / R
    spread = (logits - logits.mean(-1, keepdim=True)).std() / (3 / 4) ** 0.5
    assert spread.item() == pytest.approx(log(2) + 0.01, rel=0.01)


def test_equal_generators_draw_equal_noise_and_leave_the_global_one_alone() -> None:
    made = nn.ModuleDict({"a": router(), "b": router()})
    x = torch.randn(5, 16, generator=seeded())
    before = torch.get_rng_state()

    def drawn(seed: int) -> list[Tensor]:
        with recorded_routing(made, generator=seeded(seed)):
            return [module(x).probabilities for module in made.values()]

    (first, second), (again, _), (other, _) = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, second), "layers draw apart"
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpointed_layer_routes_as_before_when_it_computes_again() -> None:
    made = router().train()
    x = torch.randn(40, 16, generator=seeded(), requires_grad=True)

    def again(x: Tensor) -> Any:
        return checkpoint(made, x, use_reentrant=False)

    gradients: list[Tensor] = []
    for run in (made, again):
        with recorded_routing(made, generator=seeded()):
            gradients += torch.autograd.grad(run(x).routed[:, 0].square().sum(), x)
    assert torch.equal(*gradients)


def test_nothing_is_recorded_outside_the_block() -> None:
    model = reward_model("llama")
    upcycle(model, SMALL, generator=seeded())
    with recorded_routing(model) as routings:
        pass
    scores(model)
    assert not routings
    with recorded_routing(model) as routings:
        scores(model)
    assert list(routings) == list(moe_layers(model)) == [f"model.layers.{n}.mlp" for n in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_changes_neither_scores_nor_statistics(name: str) -> None:
    model = reward_model(name)
    upcycle(model, MoESettings(5, 3, noise=False), generator=seeded())
    for layer in moe_layers(model).values():
        nn.init.normal_(layer.router.weight, generator=seeded(4))
    with recorded_routing(model, MASK) as bare:
        expected = scores(model)
    padding = torch.zeros(3, 4, dtype=torch.long)
    ids, mask = torch.cat([IDS, padding], 1), torch.cat([MASK, padding], 1)
    with recorded_routing(model, mask) as padded:
        found = scores(model, ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for path, routing in bare.items():
        for field, value in routing._asdict().items():
            torch.testing.assert_close(getattr(padded[path], field), value, atol=1e-5, rtol=0)


def test_balance_reaches_router_and_noise_and_evens_the_load() -> None:
    made = nn.ModuleDict({"router": router(spread=0.3)}).train()
    x = torch.randn(200, 16, generator=seeded()) + 0.5
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    losses = []
    for step in range(60):
        with recorded_routing(made, generator=seeded(step)) as routings:
            made["router"](x)
        loss = balance_loss(routings[""])
        if not step:
            load = routings[""].load.square().sum()
            parameters = list(made.parameters())
            for gradient in torch.autograd.grad(load, parameters, retain_graph=True):
                assert gradient.any(), "counts would have none"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_a_mask_of_another_shape_is_refused() -> None:
    made = nn.ModuleDict({"router": router()})
    x = torch.randn(2, 5, 16, generator=seeded())
    with (
        pytest.raises(ValueError, match=r"saw tokens \(2, 5\), but the attention mask is \(2, 6\)"),
        recorded_routing(made, torch.ones(2, 6)),
    ):
        made["router"](x)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"active": 9}, r"active is 9; .* must be in 2 \.\. 8"),
        ({"active": 1}, r"active is 1; .* must be in 2 \.\. 8"),
        ({"shared": 0}, "at least 1 expert must be shared"),
        ({"experts": 3, "active": 2, "shared": 3}, "leave 0 to route to"),
        ({"experts": 2, "active": 2}, "leave 1 to route to"),
        ({"reinitialise": 1.5}, r"in \[0, 1\]"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    numbers: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MoESettings(**numbers)  # type: ignore[arg-type]


def test_router_stays_in_float32_when_the_model_is_cast() -> None:
    model = reward_model("llama")
    upcycle(model, SMALL, generator=seeded())
    weight = next(iter(moe_layers(model).values())).router.weight.detach().clone()
    model.bfloat16()
    layer = next(iter(moe_layers(model).values()))
    assert layer.experts["up"].weight.dtype == torch.bfloat16
    assert torch.equal(layer.router.weight, weight)
    assert scores(model).dtype == torch.bfloat16


def test_the_expected_load_leaves_padding_out() -> None:
    gates = gate(torch.randn(5, 3, generator=seeded(0)), 2)
    load = torch.rand(5, 3, generator=seeded(1))
    seen = torch.tensor([1, 0, 1, 1, 0])
    found = summarise(gates, load, seen, MoESettings(experts=4, active=3))
    torch.testing.assert_close(found.load, load[seen == 1].sum(0))


def assert_same(found: Routing, expected: Routing) -> None:
    for field, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, field), value, atol=1e-6, rtol=1e-6, msg=field)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_token_of_several_rows_counts_once_a_row(noisy: bool) -> None:
    logits = torch.randn(5, 4, generator=seeded(5), requires_grad=True)
    load = torch.rand(5, 4, generator=seeded(6)) if noisy else None
    seen = torch.tensor([3, 0, 1, 2, 1])
    found = summarise(gate(logits, 2), load, seen, SMALL)
    # the same tokens written out once a row
    each = torch.tensor([0, 0, 0, 2, 3, 3, 4])
    of_each = None if load is None else load[each]
    expected = summarise(gate(logits[each], 2), of_each, torch.ones(7, dtype=torch.long), SMALL)
    assert_same(found, expected)
    assert found.tokens.item() == 7
    assert found.counts.sum().item() == 7 * 2
    (ours,) = torch.autograd.grad(found.importance.square().sum(), logits)
    (theirs,) = torch.autograd.grad(expected.importance.square().sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_mask_of_counts_says_in_how_many_rows_a_token_stands() -> None:
    made = nn.ModuleDict({"router": router(MoESettings(5, 3, noise=False))})
    x, rows = torch.randn(1, 4, 16, generator=seeded()), torch.tensor([0, 0, 1, 3])
    with recorded_routing(made, torch.tensor([[2, 1, 0, 1]])) as packed:
        made["router"](x)
    with recorded_routing(made) as written_out:
        made["router"](x[:, rows])
    assert_same(packed[""], written_out[""])


def test_the_statistics_of_batches_join_to_those_of_all_their_tokens() -> None:
    logits = torch.randn(9, 4, generator=seeded(7))
    load, seen = torch.rand(9, 4, generator=seeded(8)), torch.tensor([1, 2, 1, 0, 3, 1, 0, 0, 1])
    bounds = [slice(0, 2), slice(2, 6), slice(6, 8), slice(8, 9)]
    parts = [summarise(gate(logits[part], 2), load[part], seen[part], SMALL) for part in bounds]
    assert [part.tokens.item() for part in parts] == [3, 5, 0, 1], "one of padding alone"
    found = joined(parts)
    assert_same(found, summarise(gate(logits, 2), load, seen, SMALL))
    assert found.counts.dtype == found.tokens.dtype == torch.int64
    assert found.weight.sum().item() == pytest.approx(1, abs=1e-6)
    assert_same(joined(parts[:1]), parts[0])


def test_batches_without_a_token_join_to_nothing() -> None:
    blank = summarise(gate(torch.zeros(2, 4), 2), None, torch.zeros(2, dtype=torch.long), SMALL)
    assert_same(joined([blank, blank]), blank)
