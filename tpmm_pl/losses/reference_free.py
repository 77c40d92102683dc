"""Losses of the policy's own log-probabilities: no reference is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmm_pl.types import PairLogps


def simpo_loss(policy: PairLogps, *, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    r"""Simple preference optimisation (Meng et al. 2024, eq. 6).

    .. math:: -\log\sigma\Big(\frac{\beta}{|c|}\log\pi_c - \frac{\beta}{|r|}\log\pi_r
              - \gamma\Big)

    Args:
        policy: Log-probabilities per completion token under the policy, each ``(B,)``.
        beta: Scale of the reward, ``> 0``; the paper uses 2 to 2.5.
        gamma: By how much the chosen reward is to exceed the rejected one, ``>= 0``; the paper
            uses 0.5 to 1.5.

    Returns:
        The loss in nats, ``(B,)``.
    """
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected) - gamma)


def orpo_loss(policy: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Odds ratio preference optimisation (Hong et al. 2024, eq. 6 and 7).

    .. math:: -p_c - \beta\log\sigma\Big(\log\frac{o(p_c)}{o(p_r)}\Big), \quad
              o(p) = \frac{e^p}{1 - e^p}

    The first term is the likelihood loss of the chosen completion. TRL's takes the mean over the
    prompt's tokens too; here only completions are scored.

    Args:
        policy: Log-probabilities per completion token :math:`p` under the policy, each ``(B,)``.
        beta: The weight :math:`\lambda` of the odds ratio in the paper, ``> 0``.

    Returns:
        The loss in nats a token, ``(B,)``.
    """
    log_odds_ratio = _log_odds(policy.chosen) - _log_odds(policy.rejected)
    return -policy.chosen - beta * F.logsigmoid(log_odds_ratio)


def sft_loss(policy: PairLogps, tokens: PairLogps) -> Tensor:
    r"""Likelihood loss of the chosen completions, every token of the batch counting alike.

    .. math:: -\log\pi_{c,i} \Big/ \tfrac{1}{B}\sum_j |c_j|

    Its mean over the batch is the mean over the batch's chosen tokens, so long completions weigh
    more than short ones.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        tokens: The completions' tokens, each ``(B,)``.

    Returns:
        The loss in nats a token, ``(B,)``.
    """
    return -policy.chosen / tokens.chosen.mean()


def _log_odds(logps: Tensor) -> Tensor:
    # a step below 0: the odds of a certain completion are infinite
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()
