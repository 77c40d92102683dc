"""From a dense model to a mixture of experts (upcycling) and back (consolidation), in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpmm_pl.merging import weighted_sum
from tpmm_pl.moe.feed_forward import FUSED, find_feed_forwards
from tpmm_pl.moe.layer import SparseMoE
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError


def upcycle(model: nn.Module, settings: MoESettings, *, generator: torch.Generator) -> None:
    """Replace every block's feed-forward layer by a mixture of copies of it, in place.

    With normalised gates and ``reinitialise`` 0 the model computes what it did, router noise or
    not. Each dense layer is freed before the next is copied.

    Args:
        model: A dense transformer.
        settings: Numbers of experts and the gate.
        generator: Draws the routers, and units where ``reinitialise`` asks for it.

    Raises:
        InputError: If the model is a mixture already, or its feed-forward layers are not found.
    """
    for name, dense in find_feed_forwards(model).items():
        parent = model.get_submodule(name)
        training = parent.get_submodule(dense.replaced[0]).training
        layer = SparseMoE(parent, dense, settings, generator=generator).train(training)
        if settings.reinitialise:
            reinitialise(layer, settings.reinitialise, generator)
        parent.set_submodule(dense.replaced[0], layer)
        for path in dense.replaced[1:]:
            parent.set_submodule(path, nn.Identity())


@torch.no_grad()
def reinitialise(layer: SparseMoE, share: float, generator: torch.Generator) -> None:
    """Draw a share of the hidden units of every routed expert afresh.

    What goes into and out of a unit is drawn together, from normal distributions with the mean and
    the spread that the chosen part of each matrix had (Drop-Upcycling, Nakamura et al. 2025).

    Args:
        layer: Holds the experts; the shared ones are left as they are.
        share: Of the units, in ``[0, 1]``.
        generator: Chooses and draws.
    """
    stacks, settings = layer.stacks, layer.settings
    units = stacks["down"].width
    count = round(share * units)
    for expert in range(settings.shared, settings.experts):
        order = torch.randperm(units, generator=generator, device=generator.device)
        chosen = order[:count].to(stacks["down"].weight.device)
        for role, stack in stacks.items():
            # a fused layer has a unit's gate and its input in two halves of the rows
            rows = torch.cat([chosen, chosen + units]) if _halved(layer, role) else chosen
            weight = stack.weight[expert]
            outputs_first = not stack.transposed
            _redraw(weight, rows, 0 if (role != "down") == outputs_first else 1, generator)
            if stack.bias is not None and role != "down":
                _redraw(stack.bias[expert], rows, 0, generator)


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """Return the mixture layers by their full names, L of them, in the order of the blocks."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseMoE)}


@torch.no_grad()
def consolidate(model: nn.Module, coefficients: Tensor) -> None:
    r"""Merge the experts of every layer into one dense layer, :math:`W = \sum_e c_e W_e`, in place.

    The dense model's own modules come back; routers go.

    Args:
        model: An upcycled model.
        coefficients: ``(L, E)``, the shared experts first; rows that sum to 1 keep the scale.

    Raises:
        InputError: If the model is no mixture.
        ValueError: If the coefficients have another shape.
    """
    layers = mixture_layers(model)
    shape = len(layers), next(iter(layers.values())).settings.experts
    if coefficients.shape != shape:
        raise ValueError(f"coefficients are {tuple(coefficients.shape)}, the model needs {shape}")
    names = list(layers)
    del layers  # each layer is freed before the next is merged
    for name, row in zip(names, coefficients.double().tolist(), strict=True):
        _restore(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name), row)


def shared_coefficients(weights: Tensor, shared: int, shared_coefficient: float) -> Tensor:
    r"""Return rows of :math:`\lambda / S` for the shared, :math:`(1 - \lambda) w_i` for the rest.

    Args:
        weights: ``(L, R)``, a distribution over the routed experts a row.
        shared: S.
        shared_coefficient: :math:`\lambda` in ``[0, 1]``; 1 is the shared experts alone.

    Returns:
        ``(L, E)``, differentiable; rows sum to 1 where those of ``weights`` do.
    """
    rows = weights.new_full((len(weights), shared), shared_coefficient / shared)
    return torch.cat([rows, (1 - shared_coefficient) * weights], dim=-1)


def expert_sources(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return for each expert the dense model's parameter names and views of its weights.

    They are what :class:`~tpmm_pl.streaming.StreamedMerge` takes as sources; nothing is copied.

    Raises:
        InputError: If the model is no mixture.
    """
    stacked = _stacked_by_dense_name(model)
    experts = next(iter(stacked.values()))[1].shape[0]
    return [{name: stack[e] for name, (_, stack) in stacked.items()} for e in range(experts)]


def expert_groups(model: nn.Module) -> dict[str, int]:
    """Return the layer number, 0 to L - 1, of the names in :func:`expert_sources`.

    Raises:
        InputError: If the model is no mixture.
    """
    return {name: number for name, (number, _) in _stacked_by_dense_name(model).items()}


def _stacked_by_dense_name(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    found = {}
    for number, (name, layer) in enumerate(mixture_layers(model).items()):
        parent = name.rpartition(".")[0]
        for role, stack in layer.stacks.items():
            for kind, tensor in stack.named_parameters():
                path = f"{parent}.{layer.dense.linears[role]}.{kind}".lstrip(".")
                found[path] = (number, tensor.detach())
    return found


def mixture_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """Return the layers of a model that must have some.

    Raises:
        InputError: If it is no mixture.
    """
    layers = moe_layers(model)
    if not layers:
        raise InputError(
            f"the {type(model).__name__} has no experts to consolidate; make some by `tpmm upcycle`"
        )
    return layers


def _restore(parent: nn.Module, layer: nn.Module, row: list[float]) -> None:
    if not isinstance(layer, SparseMoE):
        raise TypeError(f"{type(layer).__name__} is no SparseMoE")
    for path, module in layer.replaced.modules.items():
        parent.set_submodule(path, module.train(layer.training))
    for role, stack in layer.stacks.items():
        linear = parent.get_submodule(layer.dense.linears[role])
        for kind, tensor in stack.named_parameters():
            merged = weighted_sum(tensor.unbind(0), row, torch.empty_like(tensor[0]))
            setattr(linear, kind, nn.Parameter(merged, requires_grad=tensor.requires_grad))


def _halved(layer: SparseMoE, role: str) -> bool:
    return role == "up" and layer.dense.compute in FUSED


def _redraw(tensor: Tensor, chosen: Tensor, dim: int, generator: torch.Generator) -> None:
    old = tensor.index_select(dim, chosen).float()
    if not old.numel():
        return
    drawn = torch.randn(old.shape, generator=generator, device=generator.device).to(old.device)
    new = old.mean() + old.std(correction=0) * drawn
    tensor.index_copy_(dim, chosen, new.to(tensor.dtype))
