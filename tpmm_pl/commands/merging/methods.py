"""The ways to merge, each a function that fills one tensor from the sources' tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from tpmm_pl.merging import slerp_coefficients, weighted_sum
from tpmm_pl.rounds import fixed_recipe
from tpmm_pl.types import InputError, Recipe, StateDict

Merge = Callable[[str, Sequence[Tensor], Tensor], object]
"""Fills the last argument, the merge of the tensors that the sources have under a name."""

TaskMerge = Callable[[Tensor, Sequence[Tensor], Sequence[float], float, Tensor], None]
"""Takes a base, tensors, their weights and a density, and fills the last argument."""


def linear(weights: Sequence[float], dtype: torch.dtype, *, normalise: bool) -> Merge:
    """Return the weighted sum of all tensors.

    In the order of the sources, in float32 (float64 for such models), cast once: the sums of
    mergekit 0.1.5, bit for bit but for the sign of zeros.

    Args:
        weights: K numbers.
        dtype: Of the models.
        normalise: Whether the sum is divided by that of the weights.

    Raises:
        InputError: If there is nothing to divide by.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total = float(torch.tensor([list(weights)], dtype=wide).sum(1))
    if normalise and abs(total) < 1e-6:
        raise InputError(f"the weights {list(weights)} sum to 0; leave --normalize out")
    divisor = total if normalise else 1.0
    return lambda name, tensors, out: weighted_sum(tensors, weights, out, divisor=divisor)


def grouped(recipe: Recipe, group_of: Mapping[str, int]) -> Merge:
    """Return the weighted sum with a row of coefficients a group of tensors.

    Args:
        recipe: The rows.
        group_of: The row of every tensor; one that is in no group is the last source's.
    """
    newest = (0.0,) * (len(recipe.snapshots) - 1) + (1.0,)

    def merge(name: str, tensors: Sequence[Tensor], out: Tensor) -> object:
        row = recipe.coefficients[group_of[name]] if name in group_of else newest
        return weighted_sum(tensors, row, out)

    return merge


def ema_coefficients(count: int, alpha: float) -> tuple[float, ...]:
    """Return the coefficients of a moving average over models, oldest first.

    Args:
        count: K.
        alpha: Weight of each newer model: 1 is the last model, 0 the first.

    Raises:
        InputError: If ``alpha`` is not in [0, 1].
    """
    recipe = fixed_recipe("ema", 0)
    for index in range(1, count):
        recipe = fixed_recipe("ema", index, alpha=alpha, previous=recipe)
    return recipe.coefficients[0]


def slerp(t: float) -> Merge:
    """Return the point ``t`` of the arc between two models, tensor by tensor."""

    def merge(name: str, tensors: Sequence[Tensor], out: Tensor) -> object:
        first, second = tensors
        return weighted_sum(tensors, slerp_coefficients(first, second, t), out)

    return merge


def onto_base(
    method: TaskMerge, base: StateDict, weights: Sequence[float], density: float, seed: int
) -> Merge:
    """Return a merge of task vectors, what training added to a base.

    Args:
        method: See :mod:`tpmm_pl.commands.merging.task_vectors`.
        base: What the vectors are differences to.
        weights: K factors.
        density: Share of the entries of a vector that count.
        seed: Of drawn entries; each tensor has draws of its own.

    Raises:
        InputError: If ``density`` is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise InputError(f"--density is {density}; it must be above 0 and at most 1")

    def merge(name: str, tensors: Sequence[Tensor], out: Tensor) -> None:
        drawn = int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn)
            method(base[name], tensors, weights, density, out)

    return merge
