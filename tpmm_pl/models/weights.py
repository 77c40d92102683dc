"""What a policy's snapshot holds, and how a recipe gets into the policy.

Full models are merged tensor by tensor, adapters as products (:mod:`tpmm_pl.models.stacking`).
"""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpmm_pl import processes
from tpmm_pl.files import write_text
from tpmm_pl.merging import assign_groups, check_fits
from tpmm_pl.models.stacking import (
    MERGED,
    TRAINED,
    adapter_parameters,
    cut_active,
    file_name,
    stack_adapters,
    unstack,
    write_product,
)
from tpmm_pl.streaming import StreamedMerge, local_part
from tpmm_pl.trajectory import Record, TrajectoryStore
from tpmm_pl.types import InputError, Recipe, StateDict


def save_policy(policy: nn.Module, store: TrajectoryStore, round_index: int) -> Record:
    """Write the policy's weights as the snapshot of a round: all of them, or its adapter's.

    An adapter's folder is one that ``peft`` loads.
    """
    if not isinstance(policy, PeftModel):
        return store.add_snapshot(round_index, policy_state(policy))
    folder = store.folder(round_index) / "adapter"
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in policy.peft_config[TRAINED].to_dict().items()
    }
    if processes.is_first():
        text = json.dumps(config, indent=1, default=str) + "\n"
        write_text(folder / "adapter_config.json", text)
    file = "adapter/adapter_model.safetensors"
    return store.add_snapshot(round_index, policy_state(policy), file)


def policy_state(policy: nn.Module) -> dict[str, Tensor]:
    """Return what a snapshot holds: parameters once each and persistent buffers, or the adapter."""
    if isinstance(policy, PeftModel):
        adapter = adapter_parameters(policy, TRAINED)
        return {file_name(name, TRAINED): p.detach() for name, p in adapter.items()}
    state = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    return {**state, **_buffers(policy)}


def whole_state(policy: nn.Module) -> dict[str, Tensor]:
    """Gather what a snapshot holds on the CPU of the first process; others get nothing."""
    whole = {}
    for name, tensor in policy_state(policy).items():
        # every process takes part in gathering each
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first():
            whole[name] = full.cpu()
    return whole


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
        parameters, sources = stack_adapters(policy, sources)
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
        raise _misfit(store, error) from error


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
        unstack(policy)
        try:
            load_state(policy, store.source(recipe.snapshots[0]), f"round {recipe.snapshots[0]}")
        except ValueError as error:
            raise _misfit(store, error) from error
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
    error = write_product(policy, MERGED, TRAINED)
    unstack(policy)
    return error


@torch.no_grad()
def materialise_cut(
    policy: PeftModel, store: TrajectoryStore, recipe: Recipe, rank: int | None
) -> float:
    """Make the policy compute the best approximation of a recipe by an adapter of a rank.

    Args:
        policy: Its active adapter is the approximation, until something else is materialised.
        store: Holds the snapshots.
        recipe: What to approximate.
        rank: Of all adapted layers; ``None``: the policy's own.

    Returns:
        The relative error of the weights' change in the Frobenius norm, 0 where exact.
    """
    materialise(policy, store, recipe)
    return cut_active(policy, rank)


@torch.no_grad()
def load_state(policy: nn.Module, state: StateDict, what: str) -> None:
    """Overwrite a policy's weights, or its adapter's, with those of a snapshot.

    Args:
        policy: Computes as the state says from now on.
        state: As :func:`policy_state` returns it.
        what: Names the state in an error.

    Raises:
        ValueError: If the names or shapes are not the policy's.
    """
    own = policy_state(policy)
    check_fits(state, own, what)
    for name, tensor in own.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(local_part(state[name], tensor))


def _misfit(store: TrajectoryStore, error: ValueError) -> InputError:
    return InputError(
        f"a snapshot of {store.root} does not fit the policy: {error}; "
        "use the model the trajectory was made with"
    )


def _buffers(policy: nn.Module) -> dict[str, Tensor]:
    known = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in policy.state_dict().items() if name not in known}
