from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from tests.losses.samples import double, logps, swapped, with_margin
from tpmm_pl.losses import (
    cdpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    log_ratio_margin,
    rdpo_loss,
)
from tpmm_pl.types import PairLogps

Loss = Callable[..., Tensor]


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 10.0])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dpo_loss, log(2)),
        (cdpo_loss, log(2)),
        (rdpo_loss, log(2)),
        (hinge_loss, 1.0),
        (discopop_loss, (1 + log(2)) / 2),
        (exo_loss, -log(2) - 0.5 * log(1e-3 * (1 - 1e-3))),
    ],
)
def test_where_policy_and_reference_agree_beta_does_not_matter(
    loss: Loss, expected: float, beta: float
) -> None:
    values = loss(logps(0), logps(0), beta=beta)
    torch.testing.assert_close(values, torch.full((16,), expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [cdpo_loss, rdpo_loss])
def test_without_label_smoothing_the_noise_aware_losses_are_dpo(loss: Loss) -> None:
    values = loss(logps(0), logps(1), beta=0.3, label_smoothing=0.0)
    torch.testing.assert_close(values, dpo_loss(logps(0), logps(1), beta=0.3), atol=0, rtol=0)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.4])
def test_the_expectation_of_rdpo_over_flips_is_the_clean_dpo_loss(rate: float) -> None:
    policy, reference = double(logps(0)), double(logps(1))
    straight = rdpo_loss(policy, reference, label_smoothing=rate)
    flipped = rdpo_loss(swapped(policy), swapped(reference), label_smoothing=rate)
    expected = (1 - rate) * straight + rate * flipped
    clean = dpo_loss(policy, reference)
    torch.testing.assert_close(expected, clean, atol=1e-6, rtol=0)
    assert (straight - clean).abs().max() > 1e-3


def test_the_expectation_of_dpo_over_flips_is_cdpo() -> None:
    policy, reference = logps(0), logps(1)
    flipped = dpo_loss(swapped(policy), swapped(reference))
    expected = 0.8 * dpo_loss(policy, reference) + 0.2 * flipped
    torch.testing.assert_close(cdpo_loss(policy, reference, label_smoothing=0.2), expected)


def test_cdpo_is_bounded_below_by_the_entropy_of_the_rate() -> None:
    # sigma(beta m) = 1 - e is the minimum: m = log(9) / beta at e = 0.1
    policy, reference = with_margin(log(9) / 0.1)
    lowest = -(0.9 * log(0.9) + 0.1 * log(0.1))
    assert cdpo_loss(policy, reference, label_smoothing=0.1).item() == pytest.approx(lowest)
    assert cdpo_loss(logps(0), logps(1), label_smoothing=0.1).min() >= lowest - 1e-6


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.3])
def test_exo_is_a_divergence_zero_where_the_preference_is_the_smoothed_label(rate: float) -> None:
    policy, reference = with_margin(log((1 - rate) / rate) / 0.1)
    assert exo_loss(policy, reference, label_smoothing=rate).item() == pytest.approx(0, abs=1e-6)
    values = exo_loss(double(logps(0)), double(logps(1)), label_smoothing=rate)
    assert values.min() > 0


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_where_the_margin_is_half_the_inverse_of_beta(beta: float) -> None:
    policy, reference = with_margin(1 / (2 * beta))
    policy.chosen.requires_grad_()
    loss = ipo_loss(policy, reference, beta=beta)
    (gradient,) = torch.autograd.grad(loss.sum(), policy.chosen)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert gradient.item() == pytest.approx(0, abs=1e-5)
    for margin in (1 / (2 * beta) - 0.1, 1 / (2 * beta) + 0.1):
        assert ipo_loss(*with_margin(margin), beta=beta).item() == pytest.approx(0.01, rel=1e-3)


def test_a_pair_beyond_the_hinges_margin_does_not_train() -> None:
    policy, reference = with_margin(10.5)
    policy.chosen.requires_grad_()
    loss = hinge_loss(policy, reference, beta=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), policy.chosen)
    assert (loss.item(), gradient.item()) == (0.0, 0.0)


def test_discopop_is_logistic_for_wrong_pairs_and_exponential_for_right_ones() -> None:
    wrong, right = with_margin(-20.0), with_margin(20.0)
    assert discopop_loss(*wrong).item() == pytest.approx(dpo_loss(*wrong).item(), rel=1e-6)
    assert discopop_loss(*right).item() == pytest.approx(exp(-2), rel=1e-6)


def test_the_losses_by_hand() -> None:
    # margin (-1 + 4) - (-2 + 3) = 2; at beta log(3) / 2 sigma is 3/4 and its complement 1/4
    policy = PairLogps(torch.tensor([-1.0]), torch.tensor([-4.0]))
    reference = PairLogps(torch.tensor([-2.0]), torch.tensor([-3.0]))
    beta = log(3) / 2
    assert log_ratio_margin(policy, reference).tolist() == [2.0]
    expected = {
        dpo_loss: log(4 / 3),
        cdpo_loss: 0.9 * log(4 / 3) + 0.1 * log(4),
        rdpo_loss: (0.9 * log(4 / 3) - 0.1 * log(4)) / 0.8,
        ipo_loss: (2 - 1 / log(3)) ** 2,
        hinge_loss: 0.0,
        exo_loss: 0.75 * log(0.75 / 0.999) + 0.25 * log(0.25 / 0.001),
    }
    for loss, value in expected.items():
        assert loss(policy, reference, beta=beta).item() == pytest.approx(value), loss
    assert ipo_loss(policy, reference, beta=0.5).item() == pytest.approx(1.0)
    assert hinge_loss(policy, reference, beta=0.25).item() == pytest.approx(0.5)
    # tau 1/2 at beta log(3) / 4: the modulation is 3/4, the exponential 1 / sqrt(3)
    value = discopop_loss(policy, reference, beta=log(3) / 4, tau=0.5).item()
    assert value == pytest.approx(0.25 * log(1 + 1 / sqrt(3)) + 0.75 / sqrt(3))
