from __future__ import annotations

from math import log

import pytest
import torch

from tests.losses.samples import logps
from tpmm_pl.losses import orpo_loss, sft_loss, simpo_loss
from tpmm_pl.types import PairLogps

LOG_3 = log(3)


def pair(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen]), torch.tensor([rejected]))


def test_simpo_by_hand() -> None:
    # 2 (-1 + 2) - gamma = log 3
    assert simpo_loss(pair(-1, -2), beta=2, gamma=2 - LOG_3).item() == pytest.approx(log(4 / 3))
    assert simpo_loss(pair(-1, -1.25), beta=2, gamma=0.5).item() == pytest.approx(log(2))
    expected = -torch.nn.functional.logsigmoid(torch.tensor(-0.5)).item()
    assert simpo_loss(pair(-3, -3)).item() == pytest.approx(expected)


def test_orpo_by_hand() -> None:
    # odds 3 and 1/3: their ratio is 9
    value = orpo_loss(pair(log(3 / 4), log(1 / 4)), beta=0.5).item()
    assert value == pytest.approx(log(4 / 3) + 0.5 * log(10 / 9))


def test_orpo_is_the_likelihood_loss_plus_log_2_at_equal_likelihoods() -> None:
    values = orpo_loss(PairLogps(logps(0).chosen, logps(0).chosen), beta=0.25)
    torch.testing.assert_close(values, -logps(0).chosen + 0.25 * log(2))


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_orpo_of_a_certain_completion_is_finite(chosen: float, rejected: float) -> None:
    policy = pair(chosen, rejected)
    for values in policy:
        values.requires_grad_()
    loss = orpo_loss(policy)
    gradients = torch.autograd.grad(loss.sum(), policy)
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients))


def test_the_likelihood_loss_by_hand() -> None:
    policy = PairLogps(torch.tensor([-6.0, -2.0]), torch.tensor([-100.0, 0.0]))
    tokens = PairLogps(torch.tensor([4.0, 2.0]), torch.tensor([50.0, 1.0]))
    values = sft_loss(policy, tokens)
    torch.testing.assert_close(values, torch.tensor([2.0, 2 / 3]))
    # (6 + 2) nats over 6 tokens
    assert values.mean().item() == pytest.approx(8 / 6)
