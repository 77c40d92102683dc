from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.tiny import EOS, PAD, tiny_llama, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.losses import (
    bradley_terry_loss,
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    log_ratio_margin,
    preference_loss,
    rdpo_loss,
)
from tpmm_pl.models.scoring import PairScorer, per_token
from tpmm_pl.types import InputError, Pair, PairLogps

Loss = Callable[..., Tensor]


def logps(seed: int, count: int = 16) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    return PairLogps(*(-20 * torch.rand(2, count, generator=generator)))


def swapped(pairs: PairLogps) -> PairLogps:
    return PairLogps(pairs.rejected, pairs.chosen)


def with_margin(margin: float) -> tuple[PairLogps, PairLogps]:
    zero = torch.zeros(1)
    return PairLogps(torch.tensor([margin]), zero), PairLogps(zero, zero)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("loss", [dpo_loss, cdpo_loss])
def test_the_loss_is_log_2_when_policy_and_reference_agree(loss: Loss, beta: float) -> None:
    values = loss(logps(0), logps(0), beta=beta)
    torch.testing.assert_close(values, torch.full((16,), log(2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [cdpo_loss, rdpo_loss])
def test_without_label_smoothing_the_noise_aware_losses_are_dpo(loss: Loss) -> None:
    values = loss(logps(0), logps(1), beta=0.3, label_smoothing=0.0)
    torch.testing.assert_close(values, dpo_loss(logps(0), logps(1), beta=0.3), atol=0, rtol=0)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.4])
def test_the_expectation_of_rdpo_over_flips_is_the_clean_dpo_loss(rate: float) -> None:
    policy, reference = (PairLogps(*(x.double() for x in logps(seed))) for seed in (0, 1))
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
    policy, reference = with_margin(0.0)
    # sigma(beta m) = 1 - e is the minimum: m = log(9) / beta at e = 0.1
    policy = PairLogps(torch.tensor([log(9) / 0.1]), policy.rejected)
    lowest = -(0.9 * log(0.9) + 0.1 * log(0.1))
    assert cdpo_loss(policy, reference, label_smoothing=0.1).item() == pytest.approx(lowest)
    assert cdpo_loss(logps(0), logps(1), label_smoothing=0.1).min() >= lowest - 1e-6


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


def test_the_losses_by_hand() -> None:
    # margin (-1 + 4) - (-2 + 3) = 2; at beta log(3) / 2 sigma is 3/4 and its complement 1/4
    policy = PairLogps(torch.tensor([-1.0]), torch.tensor([-4.0]))
    reference = PairLogps(torch.tensor([-2.0]), torch.tensor([-3.0]))
    beta = log(3) / 2
    assert log_ratio_margin(policy, reference).tolist() == [2.0]
    assert dpo_loss(policy, reference, beta=beta).item() == pytest.approx(log(4 / 3))
    expected = 0.9 * log(4 / 3) + 0.1 * log(4)
    assert cdpo_loss(policy, reference, beta=beta).item() == pytest.approx(expected)
    expected = (0.9 * log(4 / 3) - 0.1 * log(4)) / 0.8
    assert rdpo_loss(policy, reference, beta=beta).item() == pytest.approx(expected)
    assert ipo_loss(policy, reference, beta=0.5).item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", [dpo_loss, cdpo_loss, rdpo_loss, ipo_loss])
def test_the_losses_leave_a_value_a_pair_and_no_gradient_to_other_pairs(loss: Loss) -> None:
    policy = PairLogps(*(values.requires_grad_() for values in logps(0)))
    values = loss(policy, logps(1))
    assert values.shape == (16,)
    (gradient,) = torch.autograd.grad(values[3], policy.chosen)
    assert gradient.nonzero().tolist() == [[3]]


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "rdpo", "ipo"])
def test_extreme_margins_stay_finite(name: str) -> None:
    loss = preference_loss(name).function
    for margin in (-1e5, 1e5):
        assert loss(*with_margin(margin)).isfinite().all()


PAIRS = [
    Pair("a", "", "", "", (6, 7, 8), (9, 10, EOS), (11, EOS)),
    Pair("b", "", "", "", (12, 6), (13, 14, 15, 16, EOS), (17, 18, 19, EOS)),
    Pair("c", "", "", "", (20,), (21, EOS), (22, 23, 24, 25, 26, EOS)),
]


@pytest.mark.parametrize(
    ("name", "smoothing"), [("sigmoid", 0.0), ("robust", 0.1), ("robust", 0.3), ("ipo", 0.0)]
)
def test_the_losses_agree_with_trl(name: str, smoothing: float, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    # large weights: a policy far from its reference
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    for model in (policy, reference):
        for parameter in model.parameters():
            parameter.data *= 4
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=[name],
        label_smoothing=smoothing,
        beta=0.2,
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    row = {"prompt": "w0", "chosen": "w1", "rejected": "w2"}
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list([row]),
    )
    rows = [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for pair in PAIRS
    ]
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows))

    batch = collate(PAIRS, PAD)
    loss = preference_loss(name, beta=0.2, label_smoothing=smoothing)
    under_policy, under_reference = PairScorer(policy)(batch), PairScorer(reference)(batch)
    if loss.per_token:
        under_policy, under_reference = (
            per_token(under_policy, batch),
            per_token(under_reference, batch),
        )
    ours = loss.function(under_policy, under_reference).mean()
    assert abs(ours.item() - log(2)) > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "alias"), [("sigmoid", dpo_loss), ("dpo", dpo_loss), ("robust", rdpo_loss)]
)
def test_a_loss_has_the_names_that_trl_gives_it(name: str, alias: Loss) -> None:
    loss = preference_loss(name, beta=0.7)
    settings = {"label_smoothing": 0.0} if alias is rdpo_loss else {}
    expected = alias(logps(0), logps(1), beta=0.7, **settings)
    assert torch.equal(loss.function(logps(0), logps(1)), expected)
    assert not loss.per_token


def test_only_ipo_takes_log_probabilities_a_token() -> None:
    names = ("sigmoid", "dpo", "cdpo", "rdpo", "robust", "ipo")
    assert [name for name in names if preference_loss(name).per_token] == ["ipo"]


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'sigmiod'; did you mean sigmoid"):
        preference_loss("sigmiod")
    with pytest.raises(InputError, match=r"unknown loss 'xyz'; there are sigmoid, dpo, cdpo"):
        preference_loss("xyz")


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_label_smoothing_is_refused_by_a_loss_that_would_ignore_it(name: str) -> None:
    with pytest.raises(InputError, match=r"does not use label_smoothing 0\.1; choose cdpo"):
        preference_loss(name, label_smoothing=0.1)


@pytest.mark.parametrize("name", ["cdpo", "rdpo"])
@pytest.mark.parametrize("rate", [0.5, -0.1, 1.0])
def test_a_rate_of_label_smoothing_outside_of_its_range_is_refused(name: str, rate: float) -> None:
    with pytest.raises(InputError, match=r"label_smoothing is .*; it must be in \[0, 0.5\)"):
        preference_loss(name, label_smoothing=rate)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(InputError, match=r"beta is .*; it must be positive"):
        preference_loss("sigmoid", beta=beta)


class TestBradleyTerry:
    def test_equal_rewards_cost_log_2_whatever_the_label_smoothing(self) -> None:
        rewards = torch.tensor([-3.0, 0.0, 7.0])
        for rate in (0.0, 0.1, 0.4):
            values = bradley_terry_loss(rewards, rewards, label_smoothing=rate)
            torch.testing.assert_close(values, torch.full((3,), log(2)), atol=1e-6, rtol=0)

    def test_a_constant_on_all_rewards_changes_nothing_without_centring(self) -> None:
        chosen, rejected = (x.double() for x in logps(0))
        values = bradley_terry_loss(chosen, rejected, label_smoothing=0.2)
        moved = bradley_terry_loss(chosen + 5, rejected + 5, label_smoothing=0.2)
        torch.testing.assert_close(moved, values, atol=1e-10, rtol=0)

    def test_three_pairs_by_hand(self) -> None:
        chosen, rejected = torch.tensor([log(3), 0.0, 2.0]), torch.tensor([0.0, log(3), -1.0])
        margin = torch.tensor([0.0, -2 * log(3), 3.0])
        values = bradley_terry_loss(
            chosen, rejected, margin=margin, label_smoothing=0.25, centring=0.5
        )
        # sigmoid(log 3) = 3/4; the last difference is its margin
        clear = 0.75 * log(4 / 3) + 0.25 * log(4)
        centre = log(3) ** 2 / 2
        expected = torch.tensor([clear + centre, clear + centre, log(2) + 0.5])
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)

    def test_label_smoothing_is_least_where_the_probability_is_one_minus_the_rate(self) -> None:
        # the derivative is zero at sigmoid(d) = 1 - e
        difference = torch.tensor([log(9)], requires_grad=True)
        bradley_terry_loss(difference, torch.zeros(1), label_smoothing=0.1).sum().backward()
        assert difference.grad is not None
        torch.testing.assert_close(difference.grad, torch.zeros(1), atol=1e-6, rtol=0)
