"""Merges of task vectors, what training added to a base, by peft's functions, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    dare_linear,
    disjoint_merge,
    task_arithmetic,
)
from torch import Tensor

from tpmm_pl.merging import CHUNK


def ties_merge(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float, out: Tensor
) -> None:
    r"""Write :math:`\theta_0` plus the TIES merge of task vectors into ``out``.

    Each vector keeps its largest entries; at each place a sign is elected by the sum, and the
    weighted entries of that sign are averaged (Yadav et al. 2023, algorithm 1).

    Args:
        base: :math:`\theta_0`, any float dtype.
        tensors: K tensors of its shape.
        weights: K factors.
        density: Share of entries that each vector keeps; entries as large as the smallest of
            these are kept too.
        out: Of the same shape; contiguous. The sums run in float32 or wider.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    sizes = torch.empty(base.numel(), dtype=wide)  # one for all of them
    least = [_least_kept(base, tensor, density, sizes) for tensor in tensors]
    del sizes
    factors = torch.tensor(weights, dtype=wide)[:, None]

    def merge(vectors: list[Tensor]) -> Tensor:
        kept = [v * (v.abs() >= limit) for v, limit in zip(vectors, least, strict=True)]
        stacked = torch.stack(kept)
        return disjoint_merge(stacked * factors, calculate_majority_sign_mask(stacked))

    _by_pieces(base, tensors, merge, out)


def dare_merge(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float, out: Tensor
) -> None:
    r"""Write :math:`\theta_0` plus the weighted sum of thinned task vectors into ``out``.

    Of each vector a share of entries, drawn by torch's generator, is kept and divided by that
    share, so that the expectation is the whole vector (Yu et al. 2024, DARE).

    Args:
        base: :math:`\theta_0`, any float dtype.
        tensors: K tensors of its shape.
        weights: K factors.
        density: Share of entries that each vector keeps; 1 is task arithmetic.
        out: Of the same shape; contiguous. The sums run in float32 or wider.
    """
    factors = torch.tensor(weights, dtype=torch.promote_types(out.dtype, torch.float32))

    def merge(vectors: list[Tensor]) -> Tensor:
        if density == 1:
            return task_arithmetic(vectors, factors)
        return dare_linear(vectors, factors, density)

    _by_pieces(base, tensors, merge, out)


def _by_pieces(
    base: Tensor, tensors: Sequence[Tensor], merge: Callable[[list[Tensor]], Tensor], out: Tensor
) -> None:
    # K vectors of a large layer would take K times its memory, and so would K whole pieces
    flat, size = out.view(-1), max(1, CHUNK // len(tensors))
    wide = torch.promote_types(out.dtype, torch.float32)
    for start in range(0, flat.numel(), size):
        piece = slice(start, start + size)
        origin = base.reshape(-1)[piece].to(wide)
        vectors = [tensor.reshape(-1)[piece].to(wide) - origin for tensor in tensors]
        flat[piece] = origin + merge(vectors)


def _least_kept(base: Tensor, tensor: Tensor, density: float, sizes: Tensor) -> float:
    """Return the size of the smallest entry among a share of the largest of a task vector.

    ``sizes`` is overwritten.
    """
    wide = sizes.dtype
    for start in range(0, base.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        torch.sub(
            tensor.reshape(-1)[piece].to(wide), base.reshape(-1)[piece].to(wide), out=sizes[piece]
        ).abs_()
    dropped = base.numel() - max(1, int(density * base.numel()))
    if dropped <= 0:
        return 0.0
    # in place, where torch's own selections copy the tensor and make indices of twice its size
    sizes.numpy().partition(dropped)
    return float(sizes[dropped])
