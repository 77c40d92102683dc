"""Losses that move each completion's log-ratio to the reference by itself, not the margin alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpmm_pl.types import PairLogps


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    r"""Return :math:`\log\pi - \log\rho` of the chosen and the rejected, each ``(B,)`` in nats."""
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def apo_zero_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, eq. 7).

    .. math:: 1 - \sigma(\beta l_c) + \sigma(\beta l_r)

    Raises the chosen and lowers the rejected: for chosen completions better than the policy's
    own. 1 when policy and reference agree, between 0 and 2 always.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: Strength of the pull towards the reference, ``> 0``.

    Returns:
        The loss, ``(B,)``.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Anchored preference optimisation, down (D'Oosterlinck et al. 2024, eq. 8).

    .. math:: \sigma(\beta l_c) + 1 - \sigma(\beta (l_c - l_r))

    Lowers both, the rejected more: for chosen completions worse than the policy's own.
    1 when policy and reference agree, between 0 and 2 always.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: Strength of the pull towards the reference, ``> 0``.

    Returns:
        The loss, ``(B,)``.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Self-play preference optimisation with hard labels (Wu et al. 2024, eq. 4.7).

    .. math:: \big(l_c - \tfrac{1}{2\beta}\big)^2 + \big(l_r + \tfrac{1}{2\beta}\big)^2

    The paper's win probability is 1 for the chosen and 0 for the rejected completion.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: The inverse of the paper's :math:`\eta`, ``> 0``.

    Returns:
        The loss in squared nats, ``(B,)``; :math:`1 / (2\beta^2)` when policy and reference agree.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def nca_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Noise contrastive alignment on pairs (Chen et al. 2024).

    .. math:: -\log\sigma(\beta l_c)
              - \tfrac12\log\sigma(-\beta l_c) - \tfrac12\log\sigma(-\beta l_r)

    Keeps the chosen completion's likelihood from falling, as the margin alone does not.
    :math:`2\log 2` when policy and reference agree.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: Strength of the pull towards the reference, ``> 0``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def bco_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Binary classifier optimisation on pairs (Jung et al. 2024), without its reward shift.

    .. math:: -\log\sigma(\beta l_c) - \log\sigma(-\beta l_r)

    The paper subtracts a running mean of the rewards from both; TRL 1.16 does not, nor does this:
    the loss is a function of the pair alone. :math:`2\log 2` when policy and reference agree.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: Strength of the pull towards the reference, ``> 0``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
