"""What a policy's snapshot holds, and how a recipe gets into the policy.

Full models are merged tensor by tensor. Adapters are merged as products: the factors of K adapters
are stacked into one adapter of K times the rank, whose product is the weighted sum of theirs.
Averaging A and B apart would be another function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tpmm_pl.files import write_text
from tpmm_pl.merging import assign_groups
from tpmm_pl.streaming import StreamedMerge
from tpmm_pl.trajectory import Record, TrajectoryStore
from tpmm_pl.types import InputError, Recipe, StateDict

_TRAINED, _MERGED = "default", "merge"


def save_policy(policy: nn.Module, store: TrajectoryStore, round_index: int) -> Record:
    """Write the policy's weights as the snapshot of a round: all of them, or its adapter's.

    An adapter's folder is one that ``peft`` loads.
    """
    if not isinstance(policy, PeftModel):
        return store.add_snapshot(round_index, policy_state(policy))
    folder = store.folder(round_index) / "adapter"
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in policy.peft_config[_TRAINED].to_dict().items()
    }
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1, default=str) + "\n")
    file = "adapter/adapter_model.safetensors"
    return store.add_snapshot(round_index, policy_state(policy), file)


def policy_state(policy: nn.Module) -> dict[str, Tensor]:
    """Return what a snapshot holds: parameters once each and persistent buffers, or the adapter."""
    if isinstance(policy, PeftModel):
        return {_file_name(name): p.detach() for name, p in _adapter(policy, _TRAINED).items()}
    state = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    return {**state, **_buffers(policy)}


def streamed_merge(
    policy: nn.Module, store: TrajectoryStore, snapshots: tuple[int, ...], grouping: str
) -> tuple[StreamedMerge, tuple[str, ...]]:
    """Return the merge of snapshots inside the policy's own module, and its groups' names.

    Args:
        policy: The module whose parameters receive the merge; an adapter of the stacked rank is
            made and activated in a ``PeftModel``.
        store: Holds the snapshots.
        snapshots: Which rounds, oldest first.
        grouping: See :func:`tpmm_pl.merging.assign_groups`.

    Raises:
        InputError: If a snapshot does not fit the policy.
    """
    sources: list[StateDict] = [store.source(index) for index in snapshots]
    if isinstance(policy, PeftModel):
        parameters, sources = _stack_adapters(policy, sources)
    else:
        parameters = dict(policy.named_parameters())
    groups, group_of = assign_groups(parameters, grouping)
    known = set(parameters) | set(_buffers(policy))
    try:
        for number, source in zip(snapshots, sources, strict=True):
            if extra := sorted(set(source) - known):
                raise ValueError(f"round {number} has an extra tensor {extra[0]}")
        return StreamedMerge(parameters, sources, group_of, len(groups)), groups
    except ValueError as error:
        raise InputError(
            f"a snapshot of {store.root} does not fit the policy: {error}; "
            "use the model the trajectory was made with"
        ) from error


@torch.no_grad()
def materialise(policy: nn.Module, store: TrajectoryStore, recipe: Recipe) -> None:
    """Make the policy's module compute as a recipe does, exactly.

    Args:
        policy: Its weights are overwritten; under LoRA a stacked adapter takes over until a
            recipe of one snapshot is materialised.
        store: Holds the snapshots.
        recipe: One snapshot is restored bit for bit.

    Raises:
        InputError: If a snapshot is missing or does not fit.
    """
    if isinstance(policy, PeftModel) and len(recipe.snapshots) == 1:
        _unstack(policy)
        adapter = store.source(recipe.snapshots[0])
        for name, parameter in _adapter(policy, _TRAINED).items():
            parameter.data.copy_(adapter[_file_name(name)])
        return
    merge, _ = streamed_merge(policy, store, recipe.snapshots, recipe.grouping)
    merge.write(torch.tensor(recipe.coefficients, dtype=torch.float64))
    if isinstance(policy, PeftModel):
        return
    newest = store.source(recipe.snapshots[-1])
    for name, buffer in _buffers(policy).items():
        buffer.copy_(newest[name])


@torch.no_grad()
def become(policy: nn.Module, store: TrajectoryStore, recipe: Recipe) -> float:
    """Make a recipe the policy to train next.

    A full model becomes the merge exactly. A merge of several adapters has K times the rank; it
    is cut back to the policy's rank by the best approximation of the product (Eckart and Young).

    Returns:
        The relative error of the weights' change in the Frobenius norm, 0 where exact.
    """
    materialise(policy, store, recipe)
    if not isinstance(policy, PeftModel) or len(recipe.snapshots) == 1:
        return 0.0
    stacked = _adapter(policy, _MERGED)
    trained = _adapter(policy, _TRAINED)
    lost = total = 0.0
    for name in [name for name in trained if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        b = stacked[_renamed(other, _MERGED)].double()
        a = stacked[_renamed(name, _MERGED)].double()
        left, singular, right = _svd_of_product(b, a)
        rank = trained[name].shape[0]
        _write_factors(trained[other], trained[name], left, singular, right)
        lost += float(singular[rank:].square().sum())
        total += float(singular.square().sum())
    _unstack(policy)
    return (lost / total) ** 0.5 if total else 0.0


def _svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # the SVD of B A from the small matrix between two orthogonal bases, never of (out, in) size
    basis_b, upper_b = torch.linalg.qr(b)
    basis_a, upper_a = torch.linalg.qr(a.T)
    left, singular, right = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    return basis_b @ left, singular, right @ basis_a.T


def _write_factors(b: Tensor, a: Tensor, left: Tensor, singular: Tensor, right: Tensor) -> None:
    kept = min(len(a), len(singular))
    root = singular[:kept].sqrt()
    # a direction of no weight keeps a row of A: with both factors 0 it would never train
    scale = torch.where(root > 1e-6 * root[0], root, 1.0)
    b.zero_()
    b[:, :kept] = left[:, :kept] * (singular[:kept] / scale)
    a[:kept] = scale[:, None] * right[:kept]


def _buffers(policy: nn.Module) -> dict[str, Tensor]:
    known = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in policy.state_dict().items() if name not in known}


def _adapter(policy: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    mark = f".{adapter}."
    return {
        name: parameter
        for name, parameter in policy.named_parameters()
        if "lora_" in name and mark in name
    }


def _file_name(name: str) -> str:
    return name.replace(f".{_TRAINED}.", ".").replace(f".{_MERGED}.", ".")


def _renamed(name: str, adapter: str) -> str:
    return name.replace(f".{_TRAINED}.", f".{adapter}.")


class _StackedSource(Mapping[str, Tensor]):
    """Source k of a stacked adapter: its own rows of A, all columns of B.

    The weighted sum over k then is the adapter whose product is the weighted sum of products.
    """

    def __init__(self, names: Mapping[str, str], sources: list[StateDict], k: int) -> None:
        self._names, self._sources, self._k = names, sources, k

    def __getitem__(self, name: str) -> Tensor:
        parts = [source[self._names[name]] for source in self._sources]
        if "lora_B" in name:
            return torch.cat(parts, dim=1)
        blank = [part if k == self._k else torch.zeros_like(part) for k, part in enumerate(parts)]
        return torch.cat(blank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stack_adapters(
    policy: PeftModel, sources: list[StateDict]
) -> tuple[dict[str, nn.Parameter], list[StateDict]]:
    _unstack(policy)
    policy.add_adapter(_MERGED, _stacked_config(policy.peft_config[_TRAINED], len(sources)))
    policy.set_adapter(_MERGED)
    parameters = _adapter(policy, _MERGED)
    device = next(policy.parameters()).device
    for parameter in parameters.values():
        parameter.data = parameter.data.to(device)
    names = {name: _file_name(name) for name in parameters}
    return parameters, [_StackedSource(names, sources, k) for k in range(len(sources))]


def _stacked_config(trained: Any, count: int) -> Any:
    config = deepcopy(trained)
    # the scale stays what it is: alpha / r, or alpha / sqrt(r) with use_rslora
    growth = count**0.5 if config.use_rslora else count
    config.r *= count
    config.lora_alpha *= growth
    config.rank_pattern = {name: rank * count for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: a * growth for name, a in config.alpha_pattern.items()}
    # all factors are overwritten, and other ways to begin (PiSSA) change the model itself
    config.init_lora_weights = True
    config.lora_dropout = 0.0
    return config


def _unstack(policy: PeftModel) -> None:
    policy.set_adapter(_TRAINED)
    if _MERGED in policy.peft_config:
        policy.delete_adapter(_MERGED)
