from __future__ import annotations

import itertools
from math import isnan, log

import pytest
import torch
from scipy.stats import binomtest

from tpmm_pl.stats import best_of_n, best_of_n_kl, kl_k1, kl_k3, wilson_interval, win_rate


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (517, 1000), (1, 50000)]
)
def test_the_wilson_interval_agrees_with_scipy(successes: int, trials: int) -> None:
    theirs = binomtest(successes, trials).proportion_ci(method="wilson")
    ours = wilson_interval(successes, trials)
    assert ours.value == successes / trials
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_without_trials_nothing_is_known() -> None:
    value, low, high = wilson_interval(0, 0)
    assert isnan(value)
    assert (low, high) == (0.0, 1.0)


def test_a_tie_counts_one_half() -> None:
    ours, theirs = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 5.0])
    assert win_rate(ours, theirs, generator=generator()).value == 0.5
    ours[2] = 1.0
    assert win_rate(ours, theirs, generator=generator()).value == (1 + 0.5 + 0.5 + 0.5) / 4


def test_the_win_rates_of_two_sum_to_1() -> None:
    ours, theirs = torch.randint(4, (2, 99), generator=generator())
    a, b = (win_rate(x, y, generator=generator()) for x, y in ((ours, theirs), (theirs, ours)))
    assert a.value + b.value == pytest.approx(1)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))


def test_the_bootstrap_interval_is_near_the_normal_one() -> None:
    wins = (torch.rand(400, generator=generator()) < 0.7).double()
    estimate = win_rate(wins, torch.full_like(wins, 0.5), generator=generator(), resamples=4000)
    mean, half = float(wins.mean()), 1.959964 * float(wins.std()) / len(wins) ** 0.5
    assert (estimate.low, estimate.high) == pytest.approx((mean - half, mean + half), abs=0.01)


def test_the_bootstrap_is_that_of_its_generator() -> None:
    ours, theirs = torch.rand(2, 20, generator=generator())
    a, b = (win_rate(ours, theirs, generator=generator()) for _ in range(2))
    assert a == b
    assert win_rate(ours, theirs, generator=generator().manual_seed(1)) != a


def test_scores_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) scores against \(2,\)"):
        win_rate(torch.zeros(3), torch.zeros(2), generator=generator())


def test_the_kl_estimators_average_to_the_kl_of_a_categorical() -> None:
    # exactly: the expectation over all outcomes, weighted by the sampling policy
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    kl = 0.5 * log(0.5 / 0.2) + 0.2 * log(0.2 / 0.5)
    k1, k3 = kl_k1(p.log(), q.log()), kl_k3(p.log(), q.log())
    assert float((p * k1).sum()) == pytest.approx(kl, abs=1e-6)
    assert float((p * k3).sum()) == pytest.approx(kl, abs=1e-6)
    # outcome 0: log(5/2) and 2/5 - 1 + log(5/2)
    assert k1[0].item() == pytest.approx(log(2.5))
    assert k3[0].item() == pytest.approx(0.4 - 1 + log(2.5))


def test_the_kl_estimators_are_unbiased_on_samples_of_a_gaussian() -> None:
    # KL(N(0, 1) || N(0.3, 1)) = 0.3^2 / 2
    samples = torch.randn(200_000, generator=generator(), dtype=torch.float64)
    policy, reference = -samples.square() / 2, -(samples - 0.3).square() / 2
    k1, k3 = kl_k1(policy, reference), kl_k3(policy, reference)
    assert k1.mean().item() == pytest.approx(0.045, abs=4 * 0.3 / 200_000**0.5)
    assert k3.mean().item() == pytest.approx(0.045, abs=4 * k3.std().item() / 200_000**0.5)
    assert k1.min() < 0 <= k3.min()
    assert k3.std() < k1.std() / 3


def test_the_kl_of_a_policy_to_itself_is_0() -> None:
    logps = -torch.rand(5, generator=generator())
    assert kl_k1(logps, logps).tolist() == kl_k3(logps, logps).tolist() == [0.0] * 5


def test_best_of_one_is_the_mean_and_best_of_all_the_proxys_favourite() -> None:
    proxy = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    gold = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, 0.0]])
    assert best_of_n(proxy, gold, 1).tolist() == pytest.approx([3.0, 4.0])
    assert best_of_n(proxy, gold, 3).tolist() == pytest.approx([2.0, 5.0])
    # of the three pairs, the favourites are 6, 2, 2 and 5, 5, 0
    assert best_of_n(proxy, gold, 2).tolist() == pytest.approx([10 / 3, 10 / 3])


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    proxy, gold = torch.rand(2, 1, 7, generator=generator(), dtype=torch.float64)
    favourites = [
        gold[0, max(subset, key=lambda index: float(proxy[0, index]))]
        for subset in itertools.combinations(range(7), 4)
    ]
    expected = float(torch.stack(favourites).mean())
    assert best_of_n(proxy, gold, 4).item() == pytest.approx(expected, abs=1e-12)


def test_best_of_n_refuses_more_answers_than_there_are() -> None:
    with pytest.raises(ValueError, match="n is 3"):
        best_of_n(torch.zeros(1, 2), torch.zeros(1, 2), 3)


def test_the_divergence_of_best_of_one_is_0() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(log(2) - 0.5)
