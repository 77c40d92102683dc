"""Scored completions become preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import tanh

import torch

from tpmm_pl.registry import lookup
from tpmm_pl.types import Completion, InputError, Pair

Scored = tuple[Completion, float]


@dataclass(frozen=True)
class LabelNoise:
    """How an annotator errs.

    Args:
        temperature: Of the Bradley-Terry choice, in units of score; 0: the higher score wins.
        flip: Rate at which the resulting label is swapped, in ``[0, 1]``.
    """

    temperature: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperature < 0 or not 0 <= self.flip <= 1:
            raise InputError(
                f"label noise needs temperature >= 0 and flip in [0, 1], not {self.temperature} "
                f"and {self.flip}"
            )


def pair_completions(
    completions: Sequence[Completion],
    scores: Sequence[float],
    *,
    method: str,
    noise: LabelNoise,
    generator: torch.Generator,
) -> list[Pair]:
    """Pair the completions of each prompt and label the pairs.

    Identical completions are never paired, and ties are dropped unless the label is drawn.

    Args:
        completions: All of a prompt together.
        scores: One a completion, by the annotator; higher is better.
        method: ``adjacent`` pairs samples (0, 1), (2, 3), ...; ``best_worst`` the extremes.
        noise: How labels err.
        generator: Drives the noise; two numbers are drawn a candidate, whatever happens to it.

    Raises:
        InputError: If the method is unknown.
    """
    candidates = lookup("pairing method", method, _METHODS)
    scored = zip(completions, scores, strict=True)
    pairs = []
    for _, group in groupby(scored, key=lambda item: item[0].prompt.prompt_id):
        for first, second in candidates(list(group)):
            draws = torch.rand(2, generator=generator).tolist()
            pair = _labelled(first, second, noise, draws)
            if pair is not None:
                pairs.append(pair)
    return pairs


def _labelled(first: Scored, second: Scored, noise: LabelNoise, draws: list[float]) -> Pair | None:
    difference = first[1] - second[1]
    if first[0].ids == second[0].ids or (difference == 0 and not noise.temperature):
        return None
    if noise.temperature:
        first_wins = draws[0] < (1 + tanh(difference / noise.temperature / 2)) / 2
    else:
        first_wins = difference > 0
    flipped = draws[1] < noise.flip
    winner, loser = (first, second) if first_wins != flipped else (second, first)
    (chosen, score_chosen), (rejected, score_rejected) = winner, loser
    prompt = chosen.prompt
    return Pair(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        prompt_ids=prompt.ids,
        chosen_ids=chosen.ids,
        rejected_ids=rejected.ids,
        score_chosen=score_chosen,
        score_rejected=score_rejected,
        flipped=flipped,
    )


def _adjacent(group: list[Scored]) -> list[tuple[Scored, Scored]]:
    return list(zip(group[0::2], group[1::2], strict=False))


def _best_worst(group: list[Scored]) -> list[tuple[Scored, Scored]]:
    ranked = sorted(group, key=lambda item: item[1])
    return [(ranked[-1], ranked[0])] if len(ranked) > 1 else []


_METHODS: dict[str, Callable[[list[Scored]], list[tuple[Scored, Scored]]]] = {
    "adjacent": _adjacent,
    "best_worst": _best_worst,
}
