"""Losses of the margin: by how much more than its reference the policy prefers the chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmm_pl.types import PairLogps


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    r"""Return :math:`(\log\pi_c - \log\pi_r) - (\log\rho_c - \log\rho_r)`, ``(B,)`` in nats."""
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Direct preference optimisation loss of each pair (Rafailov et al. 2023, eq. 7).

    .. math:: -\log\sigma\big(\beta[(\log\pi_c - \log\pi_r) - (\log\rho_c - \log\rho_r)]\big)

    The value is ``log 2`` when policy and reference agree, whatever ``beta`` is.

    Args:
        policy: Log-probabilities under the policy :math:`\pi`, each ``(B,)``.
        reference: The same under the frozen reference :math:`\rho`; carries no gradient.
        beta: Strength of the pull towards the reference, ``> 0``; the paper uses 0.1 to 0.5.

    Returns:
        The loss in nats, ``(B,)``; not reduced, so that callers can weight or mask pairs.
    """
    return -F.logsigmoid(beta * log_ratio_margin(policy, reference))


def cdpo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Tensor:
    r"""Conservative DPO: each label is taken to be wrong at a rate (Mitchell 2023).

    .. math:: -(1 - e)\log\sigma(\beta m) - e\log\sigma(-\beta m)

    Equals :func:`dpo_loss` at ``label_smoothing = 0``; bounded below by the entropy of the rate.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: The assumed rate :math:`e` of swapped labels, in ``[0, 0.5)``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    return smoothed_logistic(beta * log_ratio_margin(policy, reference), label_smoothing)


def rdpo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Tensor:
    r"""Robust DPO: unbiased for the clean loss under flips (Chowdhury et al. 2024, eq. 11).

    .. math:: \frac{-(1 - e)\log\sigma(\beta m) + e\log\sigma(-\beta m)}{1 - 2e}

    Its expectation over labels flipped at rate :math:`e` is the DPO loss of the clean labels.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: The rate :math:`e` of swapped labels, in ``[0, 0.5)``.

    Returns:
        The loss in nats, ``(B,)``; can be negative.
    """
    margin = beta * log_ratio_margin(policy, reference)
    clean = (1 - label_smoothing) * F.logsigmoid(margin)
    return (-clean + label_smoothing * F.logsigmoid(-margin)) / (1 - 2 * label_smoothing)


def ipo_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Identity preference optimisation (Azar et al. 2023, eq. 17).

    .. math:: \big(m - \tfrac{1}{2\beta}\big)^2

    Args:
        policy: Log-probabilities per completion token under the policy, each ``(B,)``; the
            results of the paper are of this length-normalised form.
        reference: The same under the reference.
        beta: The regularisation :math:`\tau` of the paper, ``> 0``.

    Returns:
        The loss in squared nats a token, ``(B,)``.
    """
    return (log_ratio_margin(policy, reference) - 1 / (2 * beta)).square()


def hinge_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Hinge loss of the normalised likelihoods (SLiC: Zhao et al. 2023; RSO: Liu et al. 2024).

    .. math:: \max(0, 1 - \beta m)

    1 when policy and reference agree; pairs whose margin exceeds :math:`1/\beta` no longer train.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Inverse of the margin that is asked for, ``> 0``.

    Returns:
        The loss, ``(B,)``.
    """
    return (1 - beta * log_ratio_margin(policy, reference)).relu()


def exo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Tensor:
    r"""Efficient exact optimisation on pairs, a reverse KL (Ji et al. 2024, eq. 16).

    .. math:: \sigma(\beta m)\log\frac{\sigma(\beta m)}{1 - e}
              + \sigma(-\beta m)\log\frac{\sigma(-\beta m)}{e}

    The divergence of the policy's preference from the smoothed label: 0 where
    :math:`\sigma(\beta m) = 1 - e`.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: The probability :math:`e` of the rejected completion, in ``(0, 0.5)``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    margin = beta * log_ratio_margin(policy, reference)
    smoothing = torch.full_like(margin, label_smoothing)
    chosen = margin.sigmoid() * (F.logsigmoid(margin) - torch.log1p(-smoothing))
    return chosen + (-margin).sigmoid() * (F.logsigmoid(-margin) - smoothing.log())


def discopop_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, tau: float = 0.05
) -> Tensor:
    r"""The loss found by a language model, log-ratio modulated (Lu et al. 2024, eq. 5).

    .. math:: -(1 - s)\log\sigma(\beta m) + s\,e^{-\beta m}, \quad s = \sigma(\beta m / \tau)

    Logistic for wrong pairs, exponential for right ones; :math:`(1 + \log 2) / 2` when policy and
    reference agree. Not convex.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Strength of the pull towards the reference, ``> 0``.
        tau: Width of the passage between the two forms, in ``(0, 1)``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    margin = beta * log_ratio_margin(policy, reference)
    logistic = -(-margin / tau).sigmoid() * F.logsigmoid(margin)
    # one exponent: the exponential of a very wrong margin alone overflows, and inf * 0 is nan
    return logistic + (F.logsigmoid(margin / tau) - margin).exp()


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    r"""Return :math:`-(1 - e)\log\sigma(m) - e\log\sigma(-m)`, elementwise in nats."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
