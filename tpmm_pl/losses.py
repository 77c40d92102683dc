"""Preference losses: pure functions from log-probabilities or rewards to one loss a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError, PairLogps


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
    margin = beta * log_ratio_margin(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


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


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    r"""Loss of a reward model on each pair (Ouyang et al. 2022, eq. 1).

    .. math:: -(1 - e)\log\sigma(d) - e\log\sigma(-d) + c\,(r_c + r_r)^2, \quad d = r_c - r_r - m

    The margin is Llama 2's (Touvron et al. 2023, eq. 2), the last term keeps rewards around 0
    (Eisenstein et al. 2023). ``log 2`` for equal rewards around 0 without a margin.

    Args:
        chosen: Rewards :math:`r_c` of the better completions, ``(B,)``.
        rejected: Rewards :math:`r_r` of the worse ones, ``(B,)``.
        margin: By how much :math:`m` the chosen reward is to exceed the other, ``(B,)``.
        label_smoothing: The assumed rate :math:`e` of swapped labels, in ``[0, 0.5)``.
        centring: Coefficient :math:`c`, ``>= 0``; TRL's ``center_rewards_coefficient``.

    Returns:
        The loss in nats, ``(B,)``.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(difference)
    loss = loss - label_smoothing * F.logsigmoid(-difference)
    return loss + centring * (chosen + rejected).square()


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss with its settings bound, and the form of log-probability it takes."""

    function: Callable[[PairLogps, PairLogps], Tensor]
    per_token: bool = False
    """Whether the log-probabilities are divided by the completions' tokens first."""


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_loss,
    "dpo": dpo_loss,
    "cdpo": cdpo_loss,
    "rdpo": rdpo_loss,
    "robust": rdpo_loss,
    "ipo": ipo_loss,
}


def preference_loss(
    name: str, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Resolve a loss by name; TRL's names are accepted too (``robust`` is ``rdpo``).

    Args:
        name: ``sigmoid``, ``cdpo``, ``rdpo`` or ``ipo``.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: Rate of swapped labels that ``cdpo`` and ``rdpo`` assume.

    Raises:
        InputError: If the name is unknown, a value is out of range, or label smoothing is given
            to a loss that would ignore it.
    """
    function = lookup("loss", name, _LOSSES)
    if beta <= 0:
        raise InputError(f"beta is {beta}; it must be positive")
    if function in (cdpo_loss, rdpo_loss):
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
        return PreferenceLoss(partial(function, beta=beta, label_smoothing=label_smoothing))
    if label_smoothing:
        raise InputError(
            f"the loss {name!r} does not use label_smoothing {label_smoothing}; "
            "choose cdpo or rdpo, or leave it 0"
        )
    return PreferenceLoss(partial(function, beta=beta), per_token=function is ipo_loss)
