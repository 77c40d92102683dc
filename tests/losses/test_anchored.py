from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from tests.losses.samples import logps, with_ratios
from tpmm_pl.losses import apo_down_loss, apo_zero_loss, bco_loss, nca_loss, sppo_hard_loss

Loss = Callable[..., Tensor]

LOG_3 = log(3)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (apo_zero_loss, 1.0),
        (apo_down_loss, 1.0),
        (sppo_hard_loss, 1 / (2 * 0.3**2)),
        (nca_loss, 2 * log(2)),
        (bco_loss, 2 * log(2)),
    ],
)
def test_the_values_where_policy_and_reference_agree(loss: Loss, expected: float) -> None:
    values = loss(logps(0), logps(0), beta=0.3)
    torch.testing.assert_close(values, torch.full((16,), expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "expected"),
    [
        # sigma(log 3) = 3/4
        (apo_zero_loss, LOG_3, -LOG_3, 1 / 4 + 1 / 4),
        (apo_zero_loss, -LOG_3, 0.0, 3 / 4 + 1 / 2),
        (apo_down_loss, LOG_3, 0.0, 3 / 4 + 1 / 4),
        (apo_down_loss, -LOG_3, -2 * LOG_3, 1 / 4 + 1 / 4),
        (nca_loss, LOG_3, -LOG_3, 1.5 * log(4 / 3) + 0.5 * log(4)),
        (bco_loss, LOG_3, -LOG_3, 2 * log(4 / 3)),
        (bco_loss, LOG_3, LOG_3, log(4 / 3) + log(4)),
    ],
)
def test_the_losses_by_hand(loss: Loss, chosen: float, rejected: float, expected: float) -> None:
    assert loss(*with_ratios(chosen, rejected), beta=1.0).item() == pytest.approx(expected)
    halved = loss(*with_ratios(2 * chosen, 2 * rejected), beta=0.5).item()
    assert halved == pytest.approx(expected), "only beta times the log-ratio matters"


def test_sppo_by_hand() -> None:
    # (3 - 1)^2 + (1 + 1)^2
    assert sppo_hard_loss(*with_ratios(3.0, 1.0), beta=0.5).item() == pytest.approx(8)
    assert sppo_hard_loss(*with_ratios(5.0, -5.0), beta=0.1).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "least"),
    [
        (apo_zero_loss, 1e4, -1e4, 0.0),
        (apo_zero_loss, -1e4, 1e4, 2.0),
        (apo_down_loss, -1e4, -2e4, 0.0),
        (apo_down_loss, 1e4, 2e4, 2.0),
        (bco_loss, 1e4, -1e4, 0.0),
    ],
)
def test_the_limits(loss: Loss, chosen: float, rejected: float, least: float) -> None:
    assert loss(*with_ratios(chosen, rejected)).item() == pytest.approx(least, abs=1e-6)


def slopes(loss: Loss, at_chosen: float, at_rejected: float) -> tuple[float, float]:
    policy, reference = with_ratios(at_chosen, at_rejected)
    inputs = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    of_chosen, of_rejected = torch.autograd.grad(loss(policy, reference, beta=1.0).sum(), inputs)
    return of_chosen.item(), of_rejected.item()


def test_apo_zero_raises_the_chosen_and_lowers_the_rejected() -> None:
    of_chosen, of_rejected = slopes(apo_zero_loss, 0.3, -0.2)
    assert of_chosen < 0 < of_rejected


def test_apo_down_lowers_both_and_the_rejected_more() -> None:
    of_chosen, of_rejected = slopes(apo_down_loss, -0.1, -1.5)
    assert 0 < of_chosen < of_rejected


def test_nca_holds_the_chosen_where_its_gradient_vanishes() -> None:
    # -s(-l) + s(l) / 2 = 0 at s(l) = 2/3, so at a log-ratio of log 2: the likelihood doubled
    of_chosen, of_rejected = slopes(nca_loss, log(2), 0.0)
    assert of_chosen == pytest.approx(0, abs=1e-7)
    assert of_rejected == pytest.approx(0.25)
