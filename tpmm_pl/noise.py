"""Label noise: how an annotator errs, as the probability that a label is swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite

import torch
from torch import Tensor

from tpmm_pl.types import InputError

_RATES = ("flip", "length_bias", "low_margin")


@dataclass(frozen=True)
class LabelNoise:
    r"""How an annotator errs; without arguments it does not.

    With :math:`\Delta` the difference of the scores and :math:`\tau` the temperature, the
    annotator prefers the first completion with probability :math:`\sigma(\Delta/\tau)` (Bradley
    and Terry 1952), and what it prefers is then overruled or swapped, in this order:

    1. with probability ``length_bias`` the label goes to the longer completion, whatever the
       scores say; completions of one length keep theirs,
    2. it is swapped with probability ``low_margin`` times
       :math:`\exp(-|\Delta|/` ``margin_scale`` :math:`)`,
    3. it is swapped with probability ``flip``.

    Args:
        temperature: In units of score; 0: no draw, the label is that of the scores or of the data.
        flip: Rate, in ``[0, 1]``.
        length_bias: Rate, in ``[0, 1]``; lengths are counted in tokens.
        low_margin: Rate at equal scores, in ``[0, 1]``; it falls with the difference.
        margin_scale: Difference of scores at which that rate has fallen to its ``1/e``, ``> 0``.

    Raises:
        InputError: If a number is out of range.
    """

    temperature: float = 0.0
    flip: float = 0.0
    length_bias: float = 0.0
    low_margin: float = 0.0
    margin_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges; written so that a value that is not a number is refused too."""
        for name in _RATES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"label noise: {name} is {getattr(self, name)}; it is a rate, in [0, 1]"
                )
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"label noise: temperature is {self.temperature}; it must be >= 0")
        if not 0 < self.margin_scale < float("inf"):
            raise InputError(f"label noise: margin_scale is {self.margin_scale}; it must be > 0")

    @property
    def needs_scores(self) -> bool:
        """Whether the noise depends on the annotator's scores."""
        return self.temperature > 0 or self.low_margin > 0


def flip_probabilities(
    noise: LabelNoise,
    score_chosen: Tensor,
    score_rejected: Tensor,
    length_chosen: Tensor,
    length_rejected: Tensor,
) -> Tensor:
    """Return the probability that each pair's label is swapped.

    0 everywhere without noise, ``flip`` everywhere if nothing else is set.

    Args:
        noise: How the annotator errs.
        score_chosen: ``(B,)``, in the annotator's unit; may be NaN where no score is needed.
        score_rejected: ``(B,)``.
        length_chosen: ``(B,)`` tokens.
        length_rejected: ``(B,)`` tokens.

    Returns:
        ``(B,)`` float64, in ``[0, 1]``.
    """
    difference = score_chosen.double() - score_rejected.double()
    swapped = torch.zeros_like(difference)
    if noise.temperature:
        swapped = torch.sigmoid(-difference / noise.temperature)
    to_rejected = noise.length_bias * (length_rejected > length_chosen).double()
    to_chosen = noise.length_bias * (length_chosen > length_rejected).double()
    swapped = swapped * (1 - to_chosen) + (1 - swapped) * to_rejected
    if noise.low_margin:
        near = torch.exp(-difference.abs() / noise.margin_scale)
        swapped = _one_of_two(swapped, noise.low_margin * near)
    return _one_of_two(swapped, torch.full_like(swapped, noise.flip))


def draw_flips(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw which labels are swapped, ``(B,)`` bool.

    One number is drawn a pair whatever its probability, so parts drawn one after the other give
    what the whole gives, and a higher probability only adds swaps.

    Args:
        probabilities: ``(B,)``, in ``[0, 1]``.
        generator: On the CPU.
    """
    uniform = torch.rand(probabilities.shape, generator=generator, dtype=torch.float64)
    return uniform < probabilities


def noisy_flips(
    noise: LabelNoise,
    scores_chosen: Sequence[float],
    scores_rejected: Sequence[float],
    lengths_chosen: Sequence[int],
    lengths_rejected: Sequence[int],
    seed_key: str,
) -> list[bool]:
    """Draw which labels of a data set are swapped.

    Args:
        noise: How the annotator errs.
        scores_chosen: One a pair; NaN where there is none.
        scores_rejected: The same.
        lengths_chosen: Tokens.
        lengths_rejected: Tokens.
        seed_key: Names the draw, as ``"<seed>/train"``; a pair's draw depends on it and on the
            pair's place alone.

    Raises:
        InputError: If the noise needs scores that are missing.
    """
    check_scores(noise, scores_chosen, scores_rejected)
    probabilities = flip_probabilities(
        noise,
        torch.tensor(scores_chosen, dtype=torch.float64),
        torch.tensor(scores_rejected, dtype=torch.float64),
        torch.tensor(lengths_chosen),
        torch.tensor(lengths_rejected),
    )
    seed = int.from_bytes(sha256(seed_key.encode()).digest()[:7], "big")
    return draw_flips(probabilities, torch.Generator().manual_seed(seed)).tolist()


def check_scores(
    noise: LabelNoise,
    scores_chosen: Sequence[float],
    scores_rejected: Sequence[float],
    source: str = "the data",
) -> None:
    """Refuse noise that depends on scores where pairs have none.

    Args:
        noise: How the annotator errs.
        scores_chosen: One a pair; NaN where there is none.
        scores_rejected: The same.
        source: The file, for the message.

    Raises:
        InputError: Naming the first pairs, counted from 1.
    """
    if not noise.needs_scores:
        return
    scores = zip(scores_chosen, scores_rejected, strict=True)
    without = [n for n, both in enumerate(scores, 1) if not all(map(isfinite, both))]
    if without:
        shown = ", ".join(map(str, without[:3])) + (", ..." if len(without) > 3 else "")
        raise InputError(
            f"label noise by temperature or low_margin needs the scores of both completions, and "
            f"{len(without)} of {len(scores_chosen)} pairs of {source} have none (pair {shown}); "
            "add score_chosen and score_rejected, or use flip or length_bias"
        )


def _one_of_two(first: Tensor, second: Tensor) -> Tensor:
    # two swaps undo each other
    return first * (1 - second) + second * (1 - first)
