from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.losses.samples import double, logps, tokens, with_margin
from tpmm_pl.losses import (
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    orpo_loss,
    preference_loss,
    rdpo_loss,
    sft_loss,
    simpo_loss,
)
from tpmm_pl.losses.choice import LOSSES, PreferenceLoss
from tpmm_pl.types import InputError, PairLogps

REFERENCE_FREE = ["simpo", "orpo", "sft"]
BY_TOKEN = ["sigmoid_norm", "ipo", "simpo", "orpo"]
OF_THE_BATCH = ["aot", "aot_unpaired", "sft"]


def settings(name: str) -> dict[str, float]:
    return {"label_smoothing": 0.01} if name.startswith("exo") else {}


def named(name: str) -> PreferenceLoss:
    return preference_loss(name, **settings(name))


def per_token(pairs: PairLogps, counts: PairLogps) -> PairLogps:
    return PairLogps(pairs.chosen / counts.chosen, pairs.rejected / counts.rejected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    loss, reference, counts = named(name), double(logps(1, 5)), double(tokens(0, 5))

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(PairLogps(chosen, rejected), reference, counts)

    policy = tuple(values.requires_grad_() for values in double(logps(0, 5)))
    assert torch.autograd.gradcheck(of_policy, policy, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_leave_a_value_a_pair_and_no_gradient_to_other_pairs(name: str) -> None:
    policy = PairLogps(*(values.requires_grad_() for values in logps(0)))
    values = named(name)(policy, logps(1), tokens(0))
    assert values.shape == (16,)
    gradients = [torch.autograd.grad(value, policy.chosen, retain_graph=True) for value in values]
    touched = torch.stack([gradient for (gradient,) in gradients]).nonzero()
    assert len(touched)
    assert all(of_value == of_pair for of_value, of_pair in touched.tolist())


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_stay_finite(name: str) -> None:
    count = PairLogps(torch.ones(1), torch.ones(1))
    for margin in (-1e5, 1e5):
        policy, reference = with_margin(margin)
        # as log-probabilities: none is above 0
        policy = PairLogps(*(values - max(margin, 0) for values in policy))
        policy = PairLogps(*(values.requires_grad_() for values in policy))
        value = named(name)(policy, reference, count)
        gradients = torch.autograd.grad(value.sum(), policy, allow_unused=True)
        assert value.isfinite().all()
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_only_reference_free_losses_do_without_a_reference(name: str) -> None:
    nothing = PairLogps(torch.full((16,), torch.nan), torch.full((16,), torch.nan))
    values = named(name)(logps(0), nothing, tokens(0))
    assert named(name).needs_reference == (name not in REFERENCE_FREE)
    assert values.isfinite().all() == (name in REFERENCE_FREE)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"sft"}))
def test_lengths_matter_to_length_normalised_losses_only(name: str) -> None:
    loss = named(name)
    same = torch.equal(loss(logps(0), logps(1), tokens(0)), loss(logps(0), logps(1), tokens(1)))
    assert same == (name not in BY_TOKEN)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {*OF_THE_BATCH}))
def test_a_pair_costs_the_same_alone(name: str) -> None:
    whole = named(name)(logps(0), logps(1), tokens(0))
    first = [PairLogps(*(v[:1] for v in pairs)) for pairs in (logps(0), logps(1), tokens(0))]
    torch.testing.assert_close(named(name)(*first), whole[:1])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (preference_loss("dpo", beta=0.7), dpo_loss(logps(0), logps(1), beta=0.7)),
        (
            preference_loss("robust", beta=0.7, label_smoothing=0.2),
            rdpo_loss(logps(0), logps(1), beta=0.7, label_smoothing=0.2),
        ),
        (
            preference_loss("cdpo"),
            cdpo_loss(logps(0), logps(1), label_smoothing=0.0),
        ),
        (
            preference_loss("ipo", beta=0.7),
            ipo_loss(per_token(logps(0), tokens(0)), per_token(logps(1), tokens(0)), beta=0.7),
        ),
        (
            preference_loss("sigmoid_norm", beta=0.7),
            dpo_loss(per_token(logps(0), tokens(0)), per_token(logps(1), tokens(0)), beta=0.7),
        ),
        (
            preference_loss("simpo", beta=0.7, simpo_gamma=0.0),
            simpo_loss(per_token(logps(0), tokens(0)), beta=0.7, gamma=0.0),
        ),
        (preference_loss("simpo"), simpo_loss(per_token(logps(0), tokens(0)), beta=0.1, gamma=0.5)),
        (
            preference_loss("orpo", beta=0.7),
            orpo_loss(per_token(logps(0), tokens(0)), beta=0.7),
        ),
        (preference_loss("sft"), sft_loss(logps(0), tokens(0))),
    ],
)
def test_settings_reach_the_function_of_a_name(loss: PreferenceLoss, expected: Tensor) -> None:
    assert torch.equal(loss(logps(0), logps(1), tokens(0)), expected)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dpo", "sigmoid"),
        ("robust", "rdpo"),
        ("exo_pair", "exo"),
        ("nca_pair", "nca"),
        ("bco_pair", "bco"),
    ],
)
def test_an_alias_is_the_same_loss_and_not_added_to_it(alias: str, name: str) -> None:
    assert LOSSES[alias] == LOSSES[name]
    with pytest.raises(InputError, match=f"'{name}' and '{alias}' are the same"):
        preference_loss({name: 0.5, alias: 0.5}, **settings(name))


class TestWeightedSum:
    def test_of_one_is_that_one(self) -> None:
        inputs = logps(0), logps(1), tokens(0)
        alone = preference_loss("sigmoid")(*inputs)
        assert torch.equal(preference_loss({"sigmoid": 1.0})(*inputs), alone)
        assert torch.equal(preference_loss(["sigmoid"])(*inputs), alone)
        assert torch.equal(preference_loss({"sigmoid": 2})(*inputs), 2 * alone)

    def test_adds_what_the_parts_cost(self) -> None:
        inputs = logps(0), logps(1), tokens(0)
        loss = preference_loss({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5})
        parts = loss.parts(*inputs)
        assert list(parts) == ["sigmoid", "bco_pair", "sft"]
        for name, values in parts.items():
            assert torch.equal(values, preference_loss(name)(*inputs))
        expected = 0.8 * parts["sigmoid"] + 0.2 * parts["bco_pair"] + 1.5 * parts["sft"]
        torch.testing.assert_close(loss(*inputs), expected)
        torch.testing.assert_close(
            loss.total({name: values.mean() for name, values in parts.items()}), expected.mean()
        )

    def test_of_a_list_weighs_each_by_one(self) -> None:
        inputs = logps(0), logps(1), tokens(0)
        both = preference_loss("hinge")(*inputs) + preference_loss("sft")(*inputs)
        assert torch.equal(preference_loss(["hinge", "sft"])(*inputs), both)

    def test_needs_a_reference_if_one_does(self) -> None:
        assert preference_loss(["simpo", "hinge"]).needs_reference
        assert not preference_loss(["simpo", "sft"]).needs_reference

    def test_may_have_settings_that_one_of_them_uses(self) -> None:
        inputs = logps(0), logps(1), tokens(0)
        loss = preference_loss(["simpo", "rdpo"], simpo_gamma=1.0, label_smoothing=0.1)
        parts = loss.parts(*inputs)
        assert torch.equal(parts["simpo"], preference_loss("simpo", simpo_gamma=1.0)(*inputs))
        assert torch.equal(parts["rdpo"], preference_loss("rdpo", label_smoothing=0.1)(*inputs))


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'sigmiod'; did you mean sigmoid"):
        preference_loss("sigmiod")
    with pytest.raises(InputError, match=r"unknown loss 'xyz'; there are sigmoid, dpo,"):
        preference_loss({"sigmoid": 0.5, "xyz": 0.5})


@pytest.mark.parametrize(
    ("loss", "given", "sentence"),
    [
        ("sigmoid", {"beta": 0.0}, "beta is 0.0; it must be positive"),
        ("sigmoid", {"beta": -1.0}, "beta is -1.0; it must be positive"),
        ("sigmoid", {"beta": float("nan")}, "beta is nan; it must be positive"),
        (
            "sigmoid",
            {"label_smoothing": 0.1},
            "the loss 'sigmoid' does not use label_smoothing 0.1; choose cdpo or rdpo or robust",
        ),
        ("ipo", {"label_smoothing": 0.1}, "'ipo' does not use label_smoothing 0.1; choose cdpo"),
        (
            ["hinge", "sft"],
            {"simpo_gamma": 0.0},
            "'hinge' \\+ 'sft' does not use simpo_gamma 0.0; choose simpo, or leave it out",
        ),
        ("simpo", {"discopop_tau": 0.1}, "'simpo' does not use discopop_tau 0.1; choose discopop"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must be in \[0, 0.5\)"),
        ("rdpo", {"label_smoothing": -0.1}, r"label_smoothing is -0.1; it must be in \[0, 0.5\)"),
        ("aot", {"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must be in \[0, 0.5\)"),
        ("exo", {}, r"exo needs label_smoothing in \(0, 0.5\); its paper uses 0.001"),
        (["sft", "exo_pair"], {}, r"exo needs label_smoothing in \(0, 0.5\)"),
        ("simpo", {"simpo_gamma": -0.5}, "simpo_gamma is -0.5; it must be at least 0"),
        ("discopop", {"discopop_tau": 0.0}, r"discopop_tau is 0.0; it must be in \(0, 1\)"),
        ([], {}, "no loss is named; there are sigmoid, dpo"),
        (["sft", "sft"], {}, "name one twice; give a weight"),
        ({"sigmoid": 0.0}, {}, "the weight of the loss 'sigmoid' is 0.0; it must be positive"),
        ({"sigmoid": 1.0, "sft": float("inf")}, {}, "the weight of the loss 'sft' is inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    loss: Any, given: dict[str, float], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        preference_loss(loss, **given)


@pytest.mark.parametrize(
    ("loss", "settings", "written"),
    [
        ("sigmoid", {}, "sigmoid (beta 0.1)"),
        ("rdpo", {"label_smoothing": 0.2}, "rdpo (beta 0.1, label_smoothing 0.2)"),
        ("simpo", {"beta": 2.0}, "simpo (beta 2, gamma 0.5)"),
        ({"sigmoid": 0.8, "sft": 1}, {}, "0.8 sigmoid (beta 0.1) + 1 sft"),
        ({"sigmoid": 0.8}, {}, "0.8 sigmoid (beta 0.1)"),
    ],
)
def test_a_loss_says_its_weights_and_settings(
    loss: str | dict[str, float], settings: dict[str, float], written: str
) -> None:
    assert str(preference_loss(loss, **settings)) == written
