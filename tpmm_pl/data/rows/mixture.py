"""Several streams of rows become one, in proportions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from math import isfinite
from typing import TypeVar

import torch

from tpmm_pl.types import InputError

T = TypeVar("T")

_DRAWS = 1024


def mixed(
    iterators: Sequence[Iterator[T]], weights: Sequence[float | None], generator_seed: int
) -> Iterator[T]:
    """Interleave streams at random; no row is lost and none comes twice.

    Each row comes from a stream drawn with probability proportional to its weight, among those
    that are not used up. The order within a stream stays.

    Args:
        iterators: The streams.
        weights: One a stream; ``None`` for all: the streams follow one another.
        generator_seed: Seed of the draws.

    Raises:
        InputError: As :func:`check_weights`.
    """
    check_weights(weights)
    known = [weight for weight in weights if weight is not None]
    if not known:
        return chain.from_iterable(iterators)
    return _drawn(list(iterators), known, generator_seed)


def check_weights(weights: Sequence[float | None]) -> None:
    """Check that all weights are given, or none.

    Raises:
        InputError: If some only are given, or one is not a finite number above 0.
    """
    known = [weight for weight in weights if weight is not None]
    if known and len(known) < len(weights):
        raise InputError(f"weights {list(weights)}; give every source a weight, or none")
    if wrong := [weight for weight in known if not (isfinite(weight) and weight > 0)]:
        raise InputError(f"a source has weight {wrong[0]}; give a finite number above 0")


def _drawn(iterators: list[Iterator[T]], weights: list[float], seed: int) -> Iterator[T]:
    draws = _uniform(seed)
    while iterators:
        bounds = list(accumulate(weights))
        # rounding may draw the very end: the last stream
        index = min(bisect_right(bounds, next(draws) * bounds[-1]), len(bounds) - 1)
        try:
            yield next(iterators[index])
        except StopIteration:
            del iterators[index], weights[index]


def _uniform(seed: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(_DRAWS, generator=generator, dtype=torch.float64).tolist()
