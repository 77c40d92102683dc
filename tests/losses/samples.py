"""Log-probabilities for tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from tpmm_pl.types import PairLogps


def logps(seed: int, count: int = 16) -> PairLogps:
    """Return log-probabilities between -20 and 0, each ``(count,)`` float32."""
    generator = torch.Generator().manual_seed(seed)
    return PairLogps(*(-20 * torch.rand(2, count, generator=generator)))


def double(pairs: PairLogps) -> PairLogps:
    """Return the same in float64."""
    return PairLogps(*(values.double() for values in pairs))


def swapped(pairs: PairLogps) -> PairLogps:
    """Return the same with every label flipped."""
    return PairLogps(pairs.rejected, pairs.chosen)


def with_ratios(
    chosen: float | list[float], rejected: float | list[float]
) -> tuple[PairLogps, PairLogps]:
    """Return a policy whose log-ratios to its reference are given, and the reference."""
    ratios = PairLogps(torch.tensor(chosen).reshape(-1), torch.tensor(rejected).reshape(-1))
    zero = torch.zeros_like(ratios.chosen)
    return ratios, PairLogps(zero, zero)


def with_margin(margin: float) -> tuple[PairLogps, PairLogps]:
    """Return a policy that exceeds its reference by a margin, and the reference."""
    return with_ratios(margin, 0.0)


def tokens(seed: int, count: int = 16) -> PairLogps:
    """Return token counts from 1 to 19, each ``(count,)`` float32."""
    generator = torch.Generator().manual_seed(seed)
    counts: Tensor = torch.randint(1, 20, (2, count), generator=generator).float()
    return PairLogps(*counts)
