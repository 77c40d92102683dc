"""The loss of a reward model."""

from __future__ import annotations

from torch import Tensor

from tpmm_pl.losses.margin import smoothed_logistic


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
    loss = smoothed_logistic(difference, label_smoothing)
    return loss + centring * (chosen + rejected).square()
