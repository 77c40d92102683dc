"""A merge whose sources stay on disk: written into a model, differentiated by dot products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from tpmm_pl.merging import CHUNK, check_fits, weighted_sum
from tpmm_pl.types import StateDict


class StreamedMerge:
    r"""The merge :math:`\theta = \sum_k c_{g k}\,\theta_k` inside a model's own parameters.

    ``write`` puts the merge into the parameters. A backward pass inside ``gradient`` then yields
    :math:`\partial L / \partial c_{g k}` up to a constant a group (papers: learned model soups;
    exact by the chain rule): as soon as a parameter's gradient is complete it is dotted with
    :math:`\theta_k - \theta_0` and dropped, so neither K models nor a full set of gradients is
    ever in private memory. The differences lose no digits where snapshots nearly agree; the
    constant they leave out, :math:`\langle g, \theta_0\rangle`, vanishes under any constraint
    that keeps a row's sum.

    Of a sharded parameter each process writes and dots its own shard, so that it reads no more of
    the files than that.

    Args:
        parameters: The model's parameters by name; only these are written.
        sources: K mappings from the same names to tensors, typically memory-mapped files.
        group_of: The row of coefficients of every name.
        groups: G.

    Raises:
        ValueError: If a source lacks a parameter or differs in shape.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sources: Sequence[StateDict],
        group_of: Mapping[str, int],
        groups: int,
    ) -> None:
        for number, source in enumerate(sources):
            held = {name: source[name] for name in parameters if name in source}
            check_fits(held, parameters, f"source {number}")
        self.parameters = dict(parameters)
        self.sources = list(sources)
        self.group_of = dict(group_of)
        self.groups = groups

    @torch.no_grad()
    def write(self, coefficients: Tensor) -> None:
        """Overwrite the parameters with the merge.

        Args:
            coefficients: ``(G, K)``, rows summing to 1.
        """
        rows = coefficients.detach().double().tolist()
        for name, parameter in self.parameters.items():
            tensors = [local_part(source[name], parameter) for source in self.sources]
            weighted_sum(tensors, rows[self.group_of[name]], _local(parameter.data))

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """Yield a ``(G, K)`` float64 tensor that backward passes inside the block add to.

        Parameters keep no ``.grad`` of their own, nor what training left there. Several backward
        passes accumulate. Where several processes run them, each on pairs of its own, the gradient
        of their mean loss is the mean of what they are given here.
        """
        total = torch.zeros(self.groups, len(self.sources), dtype=torch.float64)
        handles = []
        required = {name: p.requires_grad for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            parameter.grad = None
            handles.append(
                parameter.register_post_accumulate_grad_hook(self._dot_and_drop(name, total))
            )
        try:
            yield total
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(required[name])

    def _dot_and_drop(self, name: str, total: Tensor) -> Callable[[Tensor], None]:
        group = self.group_of[name]

        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                # looked up here: kept for all parameters, K stacked adapters would be K * K ones
                sources = [local_part(source[name], parameter) for source in self.sources]
                # a sharded gradient is the mean of all processes' already, here of one shard
                total[group] += _shards(gradient) * difference_dots(_local(gradient), sources)

        return hook


def difference_dots(gradient: Tensor, sources: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\langle g, \theta_k - \theta_0\rangle` for every source.

    Args:
        gradient: Of any shape.
        sources: K tensors of that shape, any float dtype.

    Returns:
        ``(K,)`` float64 on the CPU; the first is 0.
    """
    g = gradient.detach().reshape(-1)
    flat = [source.detach().reshape(-1) for source in sources]
    total = torch.zeros(len(sources), dtype=torch.float64)
    wide = torch.promote_types(g.dtype, torch.float32)
    for start in range(0, g.numel(), CHUNK):
        piece = g[start : start + CHUNK].to(wide)
        first = flat[0][start : start + CHUNK].to(piece.device, wide)
        for k in range(1, len(flat)):
            source = flat[k][start : start + CHUNK].to(piece.device, wide)
            total[k] += float(torch.dot(piece, source - first))
    return total


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of a sharded one.

    Args:
        tensor: Of the shape of ``like``, the same on every process.
        like: Says how it is spread; a tensor that is not sharded is held whole.

    Raises:
        ValueError: If ``like`` is spread in another way than in whole rows a process.
    """
    if not isinstance(like, DTensor):
        return tensor
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard):
            raise ValueError(f"a tensor is spread as {placement}; shard it by its rows alone")
        chunks = tensor.chunk(like.device_mesh.size(dimension), placement.dim)
        place = like.device_mesh.get_local_rank(dimension)
        empty = tensor.narrow(placement.dim, 0, 0)  # few rows leave some processes none
        tensor = chunks[place] if place < len(chunks) else empty
    return tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shards(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    sizes = [mesh.size(d) for d, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    return prod(sizes)
