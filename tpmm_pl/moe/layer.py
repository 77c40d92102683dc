"""A mixture of experts that computes what a dense feed-forward layer did, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmm_pl.moe.feed_forward import FeedForward, Linear, is_transposed
from tpmm_pl.moe.routing import Gates, MoESettings, Router

Experts = Mapping[str, Sequence[tuple[Tensor, Tensor | None]]]
"""Weight and bias of every expert, by role."""


class StackedLinear(nn.Module):
    """The same linear layer of all experts, in the dense layer's own layout.

    Args:
        linear: Copied for every expert.
        experts: E.
    """

    def __init__(self, linear: nn.Module, experts: int) -> None:
        super().__init__()
        self.transposed = bool(is_transposed(linear))
        self.weight = _stacked(linear.get_parameter("weight"), experts)
        bias: nn.Parameter | None = getattr(linear, "bias", None)
        self.bias = None if bias is None else _stacked(bias, experts)

    @property
    def width(self) -> int:
        """Return the number of inputs."""
        return self.weight.shape[1 if self.transposed else 2]

    def split(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return weight ``(out, in)`` and bias ``(out,)`` of every expert."""
        # unbind, whose gradient is one stack: that of an index is a full stack of zeros an expert
        weights = self.weight.unbind(0)
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind(0)
        return [(w.t() if self.transposed else w, b) for w, b in zip(weights, biases, strict=True)]

    def grouped(self, first: int, x: Tensor, sizes: Tensor) -> Tensor:
        """Apply experts ``first, first + 1, ..`` to consecutive groups of rows, in one kernel.

        Args:
            first: The first group's expert.
            x: ``(rows, in)``, sorted by expert.
            sizes: Rows of every group, int64.
        """
        weight = self.weight if self.transposed else self.weight.mT
        bias = None if self.bias is None else self.bias[first:]
        return grouped_product(x, weight[first:], bias, sizes)


@dataclass(frozen=True)
class Hollow:
    """Modules without their weights; in no list of the model's while experts stand in for them."""

    modules: Mapping[str, nn.Module]
    """By their paths in the parent."""

    def __post_init__(self) -> None:
        for module in self.modules.values():
            module.to("meta")


class SparseMoE(nn.Module):
    """Stands in for a dense feed-forward layer: shared experts for all tokens, routed for some.

    The dense layer's modules are kept without their weights, to be restored by ``consolidate``;
    activation and dropout are its own. Dropout is applied once, to the weighted sum.

    Args:
        parent: Holds the dense layer.
        dense: Where it stands in ``parent`` and how it computes.
        settings: Numbers of experts and the gate.
        generator: Draws the router.
    """

    def __init__(
        self,
        parent: nn.Module,
        dense: FeedForward,
        settings: MoESettings,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.dense = dense
        linears = {role: parent.get_submodule(path) for role, path in dense.linears.items()}
        stacks = {role: StackedLinear(lin, settings.experts) for role, lin in linears.items()}
        self.experts = nn.ModuleDict(stacks)
        self.router = Router(
            stacks["up"].width, settings, generator=generator, device=stacks["up"].weight.device
        )
        self.activation = dense.activation
        self.dropout = nn.Sequential(*dense.dropouts)
        self.replaced = Hollow({path: parent.get_submodule(path) for path in dense.replaced})

    @property
    def stacks(self) -> dict[str, StackedLinear]:
        """Return the stacked linear layers by their role."""
        return {role: m for role, m in self.experts.items() if isinstance(m, StackedLinear)}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(.., H)`` to the gated sum of the experts' outputs, same shape."""
        gates: Gates = self.router(x)
        rows = x.reshape(-1, x.shape[-1])
        stacks, s = self.stacks, self.settings
        experts = {role: stack.split() for role, stack in stacks.items()}
        shared = [self._compute(partial(_one, experts, e), rows) for e in range(s.shared)]
        total = reduce(torch.add, [y * gates.shared[:, None] for y in shared])
        # every (token, expert) once, sorted by expert: one gather, then each expert's own group
        expert_of = gates.kept.flatten()
        order = expert_of.argsort(stable=True)
        token = order // s.top_k
        y = self._routed(
            experts, rows.index_select(0, token), expert_of.bincount(minlength=s.normal)
        )
        total = total.index_add(0, token, y * gates.routed.flatten()[order, None])
        return cast(Tensor, self.dropout(total.to(y.dtype))).view(x.shape)

    def _routed(self, experts: Experts, rows: Tensor, sizes: Tensor) -> Tensor:
        first, stacks = self.settings.shared, self.stacks
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        if all(fits_grouped_mm(rows, stack.weight) for stack in stacks.values()):
            return self._compute(lambda role, x: stacks[role].grouped(first, x, sizes), rows)
        # the whole of an expert at a time: a group's hidden units stay in the processor's cache
        groups = enumerate(rows.split(sizes.tolist()), start=first)
        return torch.cat(
            [self._compute(partial(_one, experts, e), group) for e, group in groups if len(group)]
        )

    def _compute(self, linear: Linear, rows: Tensor) -> Tensor:
        return self.dense.compute(linear, self.activation, rows)


def _one(experts: Experts, e: int, role: str, x: Tensor) -> Tensor:
    return F.linear(x, *experts[role][e])


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Tensor) -> Tensor:
    """Multiply groups of rows by a matrix each, in one kernel.

    Args:
        x: ``(rows, in)``.
        weight: ``(groups, in, out)``; cast to the dtype of ``x``, as ``bias``.
        bias: ``(groups, out)``.
        sizes: Rows of every group.
    """
    ends = sizes.cumsum(0).int()
    y: Tensor = F.grouped_mm(x, weight.to(x.dtype), offs=ends)
    if bias is None:
        return y
    return y + bias.to(x.dtype).repeat_interleave(sizes, dim=0, output_size=len(x))


def fits_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Say whether torch's grouped product takes these: bfloat16 on CUDA, strides of 16 bytes."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    capable = torch.cuda.get_device_capability(x.device) >= (8, 0)
    return capable and all(size % 8 == 0 for size in weight.shape[1:])


def _stacked(tensor: nn.Parameter, copies: int) -> nn.Parameter:
    stack = tensor.detach().new_empty(copies, *tensor.shape)
    stack.copy_(tensor.detach())
    return nn.Parameter(stack, requires_grad=tensor.requires_grad)
