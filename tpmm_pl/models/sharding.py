"""Weights spread over processes: fully sharded data parallelism (FSDP2) of any decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tpmm_pl import processes
from tpmm_pl.models.tree_pass import unwrapped
from tpmm_pl.types import InputError


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a decoder's weights over the processes of a mesh, block by block.

    Blocks, the rest of the backbone and an untied head are units of their own, so that each can be
    called alone. Adapters stay whole on every process: they are small, and merges are made of
    their products.

    Args:
        model: A Hugging Face decoder or a ``PeftModel`` of one, in full on every process.
        mesh: Lightning's: processes along ``data_parallel``, one along ``tensor_parallel``.

    Raises:
        InputError: If no list of blocks is found, or tensors are to be parallel too.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            f"tensor_parallel_size is {mesh['tensor_parallel'].size()}; it must be 1, and"
            " data_parallel_size the number of processes"
        )
    inner: Any = unwrapped(model)
    backbone = inner.base_model
    blocks = next((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), None)
    if not blocks:
        raise InputError(
            f"{type(inner).__name__} has no list of decoder blocks to shard; use the strategy ddp"
        )
    trained = {p for p in model.parameters() if p.requires_grad}
    kept = trained if isinstance(model, PeftModel) else set()
    shared = set(backbone.parameters())
    # a tied head has no weights of its own
    heads = [m for m in inner.children() if m is not backbone and set(m.parameters()) - shared]
    units = [*blocks, backbone] if backbone is inner else [*blocks, backbone, *heads]
    data = mesh["data_parallel"]
    for unit in units:
        fully_shard(unit, mesh=data, reshard_after_forward=True, ignored_params=kept)
    _tie(model)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Hold a sharded model whole on every process; others stay as they are.

    For passes without gradients: each process may then run as many as it likes, of its own length.
    It takes the memory of one model.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    if units:
        _tie(model)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
        if units:
            _tie(model)


def unsharded_type(module: object) -> type:
    """Return the class of a module before sharding, which makes it one of a subclass."""
    return type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model's weights are spread over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the gradients of parameters that a sharded model keeps whole, as its adapters."""
    if not is_sharded(model):
        return
    gradients: list[Tensor] = [
        p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)
    ]
    if gradients:
        joined = processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _tie(model: nn.Module) -> None:
    # sharding replaces the parameters of a unit's own modules; a tied head lies outside of them
    inner: Any = unwrapped(model)
    inner.tie_weights()
