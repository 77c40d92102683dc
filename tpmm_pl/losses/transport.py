"""Losses between distributions: log-ratios are matched by rank over the batch, not pair by pair.

They are functions of the batch. Under gradient accumulation and on several devices every
micro-batch is sorted by itself, so its size matters: the larger, the nearer to the distribution.
"""

from __future__ import annotations

from torch import Tensor

from tpmm_pl.losses.anchored import log_ratios
from tpmm_pl.losses.margin import smoothed_logistic
from tpmm_pl.types import PairLogps


def aot_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    r"""Alignment by optimal transport on pairs (Melnyk et al. 2024).

    .. math:: -\log\sigma\big(\beta [d^\pi_{(i)} - d^\rho_{(i)}]\big), \quad
              d = \log p_c - \log p_r

    The i-th smallest difference under the policy is set against the i-th smallest under the
    reference. Equals :func:`cdpo_loss` for a batch of one, or where both rank pairs alike.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: The assumed rate of swapped labels, in ``[0, 0.5)``.

    Returns:
        The loss in nats, ``(B,)``; a value belongs to the pair of the policy's difference in it.
    """
    differences = policy.chosen - policy.rejected
    matched = _of_equal_rank(differences, reference.chosen - reference.rejected)
    return smoothed_logistic(beta * (differences - matched), label_smoothing)


def aot_unpaired_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    r"""Alignment by optimal transport without pairs (Melnyk et al. 2024).

    .. math:: -\log\sigma\big(\beta [l_{c,(i)} - l_{r,(i)}]\big)

    The i-th smallest log-ratio of the chosen completions is set against the i-th smallest of the
    rejected ones, whichever prompt it belongs to. Equals :func:`cdpo_loss` for a batch of one.

    Args:
        policy: Log-probabilities under the policy, each ``(B,)``.
        reference: The same under the reference; :math:`l` is the difference.
        beta: Strength of the pull towards the reference, ``> 0``.
        label_smoothing: The assumed rate of swapped labels, in ``[0, 0.5)``.

    Returns:
        The loss in nats, ``(B,)``; a value belongs to the pair of the chosen completion in it.
    """
    chosen, rejected = log_ratios(policy, reference)
    matched = _of_equal_rank(chosen, rejected)
    return smoothed_logistic(beta * (chosen - matched), label_smoothing)


def _of_equal_rank(values: Tensor, others: Tensor) -> Tensor:
    # in the order of `values`, not sorted: a weight of a pair multiplies what is the pair's
    return others.sort().values[values.argsort().argsort()]
