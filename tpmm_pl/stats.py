"""Statistics of preferences and rewards, with their uncertainty."""

from __future__ import annotations

from math import comb, log
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number with a 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Estimate:
    """Return a share with its 95 % score interval (Wilson 1927).

    Args:
        successes: Count, ``0 <= successes <= trials``.
        trials: Count; with 0 trials the estimate is NaN and the interval ``[0, 1]``.
        z: Standard normal quantile of the interval.
    """
    if trials == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = (share * (1 - share) + z * z / (4 * trials)) / trials
    half = z * spread**0.5 / (1 + z * z / trials)
    return Estimate(share, centre - half, centre + half)


def win_rate(
    ours: Tensor, theirs: Tensor, *, generator: torch.Generator, resamples: int = 1000
) -> Estimate:
    """Return how often ``ours`` scores higher on the same prompts; a tie counts one half.

    Args:
        ours: Scores, ``(n,)``.
        theirs: Scores of the other model on the same prompts, ``(n,)``.
        generator: Drives the bootstrap over prompts.
        resamples: Bootstrap samples behind the 95 % percentile interval.

    Raises:
        ValueError: If the two are not of one length.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{tuple(ours.shape)} scores against {tuple(theirs.shape)}")
    wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    picks = torch.randint(len(wins), (resamples, len(wins)), generator=generator)
    low, high = wins[picks].mean(-1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(float(wins.mean()), low, high)


def kl_k1(policy: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) from samples of the policy: the plain log-ratio.

    Unbiased; single values may be negative (Schulman 2020, k1).

    Args:
        policy: Sequence log-probabilities in nats under the sampling policy, ``(n,)``.
        reference: The same under the reference, ``(n,)``.

    Returns:
        One value a sample in nats, ``(n,)``.
    """
    return policy - reference


def kl_k3(policy: Tensor, reference: Tensor) -> Tensor:
    r"""Estimate KL(policy || reference) without negative values (Schulman 2020, k3).

    :math:`r - 1 - \log r` with :math:`r = \rho/\pi`; unbiased, of smaller variance where the two
    are close.

    Args:
        policy: Sequence log-probabilities in nats under the sampling policy, ``(n,)``.
        reference: The same under the reference, ``(n,)``.

    Returns:
        One value a sample in nats, ``(n,)``, never negative.
    """
    log_ratio = reference - policy
    return log_ratio.exp() - 1 - log_ratio


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    r"""Return the expected gold score of the best of n answers by proxy, a prompt at a time.

    The mean over all :math:`\binom{N}{n}` subsets of the N answers, not over drawn ones
    (Nakano et al. 2021, app. I): the answer of rank r is the best of
    :math:`\binom{r-1}{n-1}` of them. ``n = 1`` is the plain mean; ties go to the later answer.

    Args:
        proxy: Scores that choose, ``(P, N)``.
        gold: Scores of the same answers, ``(P, N)``.
        n: Answers a choice, ``1 <= n <= N``.

    Returns:
        ``(P,)`` float64.

    Raises:
        ValueError: If the shapes disagree or ``n`` is out of range.
    """
    count = proxy.shape[-1]
    if proxy.shape != gold.shape or not 1 <= n <= count:
        raise ValueError(f"n is {n} for scores of shapes {proxy.shape} and {gold.shape}")
    ranked = gold.double().gather(-1, proxy.argsort(dim=-1, stable=True))
    whole = comb(count, n)
    shares = torch.tensor([comb(rank, n - 1) / whole for rank in range(count)], dtype=torch.float64)
    return (ranked * shares).sum(-1)


def best_of_n_kl(n: int) -> float:
    """Return KL(best of n || one answer) in nats, ``log n - (n - 1) / n`` (Gao et al. 2022)."""
    return log(n) - (n - 1) / n
