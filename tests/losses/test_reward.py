from __future__ import annotations

from math import log

import torch

from tests.losses.samples import double, logps
from tpmm_pl.losses import bradley_terry_loss


def test_equal_rewards_cost_log_2_whatever_the_label_smoothing() -> None:
    rewards = torch.tensor([-3.0, 0.0, 7.0])
    for rate in (0.0, 0.1, 0.4):
        values = bradley_terry_loss(rewards, rewards, label_smoothing=rate)
        torch.testing.assert_close(values, torch.full((3,), log(2)), atol=1e-6, rtol=0)


def test_a_constant_on_all_rewards_changes_nothing_without_centring() -> None:
    chosen, rejected = double(logps(0))
    values = bradley_terry_loss(chosen, rejected, label_smoothing=0.2)
    moved = bradley_terry_loss(chosen + 5, rejected + 5, label_smoothing=0.2)
    torch.testing.assert_close(moved, values, atol=1e-10, rtol=0)


def test_three_pairs_by_hand() -> None:
    chosen, rejected = torch.tensor([log(3), 0.0, 2.0]), torch.tensor([0.0, log(3), -1.0])
    margin = torch.tensor([0.0, -2 * log(3), 3.0])
    values = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=0.25, centring=0.5)
    # sigmoid(log 3) = 3/4; the last difference is its margin
    clear = 0.75 * log(4 / 3) + 0.25 * log(4)
    centre = log(3) ** 2 / 2
    expected = torch.tensor([clear + centre, clear + centre, log(2) + 0.5])
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_label_smoothing_is_least_where_the_probability_is_one_minus_the_rate() -> None:
    # the derivative is zero at sigmoid(d) = 1 - e
    difference = torch.tensor([log(9)], requires_grad=True)
    bradley_terry_loss(difference, torch.zeros(1), label_smoothing=0.1).sum().backward()
    assert difference.grad is not None
    torch.testing.assert_close(difference.grad, torch.zeros(1), atol=1e-6, rtol=0)
