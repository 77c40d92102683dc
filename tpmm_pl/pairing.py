"""Scored completions become preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from math import isfinite, tanh

import torch
from torch import Generator

from tpmm_pl.noise import LabelNoise, flip_probabilities
from tpmm_pl.registry import lookup
from tpmm_pl.types import Completion, InputError, Pair

Scored = tuple[Completion, float]
Candidate = tuple[Scored, Scored]


def pair_completions(
    completions: Sequence[Completion],
    scores: Sequence[float],
    *,
    method: str,
    noise: LabelNoise,
    generator: Generator,
    min_margin: float = 0.0,
) -> list[Pair]:
    """Pair the completions of each prompt and label the pairs.

    Identical completions are never paired, and ties are dropped unless the label is drawn.

    Args:
        completions: All of a prompt together.
        scores: One a completion, by the annotator; higher is better.
        method: Which completions of a prompt meet; see :func:`check_method`.
        noise: How labels err. ``flipped`` says that a label was swapped, not how one was drawn.
        generator: Drives the noise; two numbers are drawn a candidate, whatever happens to it.
        min_margin: Candidates whose scores differ by less are dropped.

    Raises:
        InputError: If the method is unknown, ``min_margin`` is negative, or a score is no finite
            number.
    """
    check_method(method, min_margin)
    _check_finite(completions, scores)
    candidates = METHODS[method]
    scored = zip(completions, scores, strict=True)
    labels, draws = [], []
    for _, group in groupby(scored, key=lambda item: item[0].prompt.prompt_id):
        for first, second in candidates(list(group), generator):
            for_label, for_flip = torch.rand(2, generator=generator).tolist()
            if _worth_pairing(first, second, noise, min_margin):
                labels.append(_labelled(first, second, noise, for_label))
                draws.append(for_flip)
    flips = _flipped(labels, noise, draws)
    pairs = [_pair(*label, flipped) for label, flipped in zip(labels, flips, strict=True)]
    return [_with_margin(pair) for pair in pairs] if method == "margin" else pairs


def check_method(method: str, min_margin: float = 0.0) -> None:
    """Refuse an unknown method of pairing, or a ``min_margin`` below 0.

    ``best_worst``
        The highest score with the lowest; one pair a prompt. Online-RLHF calls it ``max_min``.
    ``best_random``
        The highest score with any other completion, as UltraFeedback was binarised; one pair a
        prompt. Online-RLHF calls it ``max_random``.
    ``random``
        Two completions, whatever their scores; one pair a prompt.
    ``adjacent``
        Samples (0, 1), (2, 3), ...; K / 2 pairs a prompt, every completion in one of them.
    ``all``
        Every two completions; K (K - 1) / 2 pairs a prompt.
    ``margin``
        The same pairs; the difference of their scores is noted as the pair's ``margin``, which
        reward models train on.

    Raises:
        InputError: If the method is unknown, naming the nearest, or the margin is out of range.
    """
    lookup("pairing method", method, METHODS)
    if not 0 <= min_margin < float("inf"):
        raise InputError(f"min_margin is {min_margin}; it is a difference of scores, >= 0")


def _check_finite(completions: Sequence[Completion], scores: Sequence[float]) -> None:
    for completion, score in zip(completions, scores, strict=True):
        if not isfinite(score):
            raise InputError(
                f"the annotator's score of completion {completion.index} of prompt "
                f"{completion.prompt.prompt_id} is {score}; a label needs a finite number"
            )


def _worth_pairing(first: Scored, second: Scored, noise: LabelNoise, min_margin: float) -> bool:
    difference = abs(first[1] - second[1])
    if first[0].ids == second[0].ids or difference < min_margin:
        return False
    return difference != 0 or noise.temperature > 0


def _labelled(first: Scored, second: Scored, noise: LabelNoise, draw: float) -> Candidate:
    difference = first[1] - second[1]
    if noise.temperature:
        first_wins = draw < (1 + tanh(difference / noise.temperature / 2)) / 2
    else:
        first_wins = difference > 0
    return (first, second) if first_wins else (second, first)


def _flipped(labels: Sequence[Candidate], noise: LabelNoise, draws: list[float]) -> list[bool]:
    scores = [[score for _, score in label] for label in labels]
    lengths = [[len(completion.ids) for completion, _ in label] for label in labels]
    probabilities = flip_probabilities(
        replace(noise, temperature=0.0),  # which has had its say in the label
        *torch.tensor(scores, dtype=torch.float64).reshape(-1, 2).unbind(1),
        *torch.tensor(lengths).reshape(-1, 2).unbind(1),
    )
    return (torch.tensor(draws, dtype=torch.float64) < probabilities).tolist()


def _pair(winner: Scored, loser: Scored, flipped: bool) -> Pair:
    (chosen, score_chosen), (rejected, score_rejected) = (
        (loser, winner) if flipped else (winner, loser)
    )
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


def _with_margin(pair: Pair) -> Pair:
    # positive also where the label is swapped: the annotator does not know that it errs
    return replace(pair, margin=abs(pair.score_chosen - pair.score_rejected))


def _adjacent(group: list[Scored], generator: Generator) -> list[Candidate]:
    return list(zip(group[0::2], group[1::2], strict=False))


def _best_worst(group: list[Scored], generator: Generator) -> list[Candidate]:
    ranked = sorted(group, key=lambda item: item[1])
    return [(ranked[-1], ranked[0])] if len(ranked) > 1 else []


def _best_random(group: list[Scored], generator: Generator) -> list[Candidate]:
    *others, best = sorted(group, key=lambda item: item[1])
    if not others:
        return []
    return [(best, others[int(torch.randint(len(others), (), generator=generator))])]


def _random(group: list[Scored], generator: Generator) -> list[Candidate]:
    first, *rest = torch.randperm(len(group), generator=generator).tolist()
    return [(group[first], group[rest[0]])] if rest else []


def _all(group: list[Scored], generator: Generator) -> list[Candidate]:
    return list(combinations(group, 2))


METHODS: dict[str, Callable[[list[Scored], Generator], list[Candidate]]] = {
    "best_worst": _best_worst,
    "max_min": _best_worst,
    "best_random": _best_random,
    "max_random": _best_random,
    "random": _random,
    "adjacent": _adjacent,
    "all": _all,
    "margin": _all,
}
"""Which completions of a prompt meet; described at :func:`check_method`."""
