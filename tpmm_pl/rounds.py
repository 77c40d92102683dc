"""Rounds of one fit, and the references that need no learning."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError, Recipe

STRATEGIES = ("last", "initial", "uniform", "window", "ema", "learned")
"""Ways to make the next reference from the trajectory."""


@dataclass(frozen=True)
class RoundSchedule:
    """Rounds ``1..T`` over epochs ``0..``: round = epoch // epochs_per_round + 1."""

    epochs_per_round: int = 1

    def round_of(self, epoch: int) -> int:
        """Return the round that trains in ``epoch``."""
        return epoch // self.epochs_per_round + 1

    def finished(self, epochs: int) -> int:
        """Return how many rounds are complete after ``epochs`` whole epochs."""
        return epochs // self.epochs_per_round


def run_seed() -> int:
    """Return the seed that ``seed_everything`` has set for the run; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def check_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        InputError: Naming the nearest ones.
    """
    lookup("strategy", name, dict.fromkeys(STRATEGIES))


def one_hot(round_index: int, strategy: str = "last") -> Recipe:
    """Return the recipe that is one snapshot, bit for bit."""
    return Recipe(strategy, (round_index,))


def fixed_recipe(
    strategy: str,
    round_index: int,
    *,
    window: int = 3,
    alpha: float = 0.6,
    previous: Recipe | None = None,
) -> Recipe:
    r"""Return the reference made after a round by a strategy without learning.

    ``ema`` is the soft update of TR-DPO, :math:`\rho_t = \alpha\theta_t + (1-\alpha)\rho_{t-1}`
    (Gorbatovski et al. 2024, eq. 4), written out as coefficients over the trajectory.

    Args:
        strategy: ``last``, ``initial``, ``uniform``, ``window`` or ``ema``.
        round_index: The round just finished, 0 for the start.
        window: How many of the newest snapshots ``window`` averages.
        alpha: Weight of the newest policy in ``ema``: 1 is ``last``, 0 is ``initial``.
        previous: The recipe of the round before; ``ema`` continues it.

    Raises:
        InputError: If the strategy is unknown or a setting is out of range.
    """
    if strategy == "last":
        return one_hot(round_index)
    if strategy == "initial":
        return one_hot(0, "initial")
    if strategy == "ema":
        return _ema_recipe(round_index, alpha, previous)
    if strategy not in ("uniform", "window"):
        check_strategy(strategy)
        raise InputError(f"the strategy {strategy!r} needs pairs to learn from")
    if window < 1:
        raise InputError(f"window is {window}; it must be at least 1 snapshot")
    first = 0 if strategy == "uniform" else max(0, round_index + 1 - window)
    snapshots = tuple(range(first, round_index + 1))
    share = 1 / len(snapshots)
    return Recipe(strategy, snapshots, ((share,) * len(snapshots),))


def _ema_recipe(round_index: int, alpha: float, previous: Recipe | None) -> Recipe:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; it must be in [0, 1]")
    if round_index == 0 or previous is None:
        return one_hot(round_index, "ema")
    older = tuple((1 - alpha) * c for c in previous.coefficients[0])
    return Recipe("ema", (*previous.snapshots, round_index), ((*older, alpha),))


def entropy(recipe: Recipe) -> float:
    """Return the entropy of the coefficients in nats, averaged over groups.

    ``log K`` for the plain average, 0 for a single snapshot; negative coefficients of an affine
    merge count by their size.
    """
    rows = torch.tensor(recipe.coefficients, dtype=torch.float64).abs()
    shares = rows / rows.sum(-1, keepdim=True)
    return float(torch.special.entr(shares).sum(-1).mean())
