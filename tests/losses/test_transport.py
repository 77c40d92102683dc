from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from tests.losses.samples import logps, with_ratios
from tpmm_pl.losses import aot_loss, aot_unpaired_loss, cdpo_loss, dpo_loss
from tpmm_pl.types import PairLogps

Loss = Callable[..., Tensor]

LOG_3 = log(3)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_a_batch_of_one_is_cdpo(loss: Loss) -> None:
    policy, reference = logps(0, 1), logps(1, 1)
    expected = cdpo_loss(policy, reference, beta=0.3, label_smoothing=0.2)
    values = loss(policy, reference, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_where_policy_and_reference_rank_pairs_alike_aot_is_dpo() -> None:
    reference = logps(1)
    policy = PairLogps(1.5 * reference.chosen, 1.5 * reference.rejected)
    torch.testing.assert_close(aot_loss(policy, reference), dpo_loss(policy, reference))


def test_aot_by_hand() -> None:
    # differences 2 log 3, 0 against 0, log 3: by rank 2 log 3 - log 3 and 0 - 0
    zero = torch.zeros(2)
    policy = PairLogps(torch.tensor([2 * LOG_3, 0.0]), zero)
    reference = PairLogps(torch.tensor([0.0, LOG_3]), zero)
    values = aot_loss(policy, reference, beta=1.0)
    torch.testing.assert_close(values, torch.tensor([log(4 / 3), log(2)]))
    smoothed = aot_loss(policy, reference, beta=1.0, label_smoothing=0.25)
    expected = torch.tensor([0.75 * log(4 / 3) + 0.25 * log(4), log(2)])
    torch.testing.assert_close(smoothed, expected)


def test_unpaired_aot_by_hand() -> None:
    # chosen 0, 2 log 3, log 3 against rejected log 3, -log 3, 0: by rank log 3 each
    policy, reference = with_ratios([0.0, 2 * LOG_3, LOG_3], [LOG_3, -LOG_3, 0.0])
    values = aot_unpaired_loss(policy, reference, beta=1.0)
    torch.testing.assert_close(values, torch.full((3,), log(4 / 3)))


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_a_value_stays_with_its_pair_when_the_batch_is_shuffled(loss: Loss) -> None:
    policy, reference = logps(0), logps(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = (PairLogps(*(values[order] for values in pairs)) for pairs in (policy, reference))
    torch.testing.assert_close(loss(*shuffled), loss(policy, reference)[order])


def test_the_reference_of_another_pair_counts_only_by_its_rank() -> None:
    policy, reference = logps(0), logps(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed = PairLogps(*(values[order] for values in reference))
    torch.testing.assert_close(aot_loss(policy, mixed), aot_loss(policy, reference))
    assert not torch.allclose(dpo_loss(policy, mixed), dpo_loss(policy, reference))
