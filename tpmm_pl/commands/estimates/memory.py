"""What a fit holds in the memory of each device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from peft import PeftModel
from torch import nn

from tpmm_pl.commands.estimates.table import Row, size
from tpmm_pl.commands.estimates.workload import Workload
from tpmm_pl.logps import LOGITS_BUDGET
from tpmm_pl.models.blueprint import cache_bytes, saved_bytes, stored_bytes
from tpmm_pl.models.weights import policy_state
from tpmm_pl.modules.fusion import FusionWeights
from tpmm_pl.types import InputError

_SHARDING = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    copies: int
    """Of the weights in the lower precision of autocast."""
    gradients: int
    """Of all that trains; of the largest parameter where coefficients alone are learned."""
    optimizer: int
    activations: int | None
    """``None``: not known."""
    logits: int
    """0 where they are in the activations."""
    gradient_at_once: int
    """The largest that fusion holds, whatever the number of snapshots."""
    stacked: int
    """Adapters of all snapshots side by side, in fusion."""
    cache: int
    """Keys and values in sampling."""
    gathered: int
    """Weights that other devices hold in training, in passes without gradients."""
    measured: bool = False
    """Whether the activations, logits among them, are those of a real pass."""

    @property
    def step(self) -> int:
        """At the end of a forward pass of training, when gradients are there."""
        return self.held + self.gradients + self.passing

    @property
    def fusion(self) -> int:
        """In a step of fusion."""
        return self.held + self.gradient_at_once + self.stacked + self.passing

    @property
    def sampling(self) -> int:
        """While completions are sampled."""
        return self.held + self.gathered + self.cache

    @property
    def scoring(self) -> int:
        """While pairs are scored, without gradients."""
        return self.held + self.gathered + self.logits

    @property
    def held(self) -> int:
        """Throughout the fit."""
        return self.weights + self.copies + self.optimizer

    @property
    def passing(self) -> int:
        """Between forward and backward."""
        return (self.activations or 0) + self.logits

    @property
    def most(self) -> int:
        """The largest of the four."""
        return max(self.step, self.fusion, self.sampling, self.scoring)


def memory(model: nn.Module, module: Any, trainer: Trainer, data: Any, work: Workload) -> Memory:
    """Return what a fit needs of the memory of a device.

    Args:
        model: On the ``meta`` device, in the dtype it computes in.
        module: Of the fit; of one that learns coefficients, the weights do not train.
        trainer: Its strategy says what is divided, its precision what is kept.
        data: Its ``token_budget`` is what goes through at once.
        work: For sampling and for the adapters of a trajectory.
    """
    merges = isinstance(module, FusionWeights)
    trained = [] if merges else [p for p in model.parameters() if p.requires_grad]
    parts = shards(trainer)
    source = source_of(module)
    weights = stored_bytes(model, source.describe().get("quantization"))
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    gradients = largest if merges else sum(p.numel() * p.element_size() for p in trained)
    adapters = adapter_bytes(model) * work.snapshots if work.fusion.count else 0
    mixed = trainer.precision.endswith("-mixed")
    itemsize = 2 if mixed else next(model.parameters()).itemsize
    return Memory(
        weights=weights // parts,
        copies=weights // 2 if mixed else 0,
        gradients=gradients // parts,
        optimizer=0 if merges else optimizer_bytes(module.make_optimizer, trained) // parts,
        activations=saved_bytes(model, data.token_budget),
        logits=_logits(model, data.token_budget, itemsize),
        gradient_at_once=largest if work.fusion.count and not adapters else 0,
        stacked=adapters // parts,
        cache=prod(work.at_once) * (cache_bytes(model) or 0) // (2 if mixed else 1),
        gathered=weights - weights // parts if work.scored.count or prod(work.at_once) else 0,
    )


def memory_rows(found: Memory, trainer: Trainer, data: Any, work: Workload) -> list[Row]:
    """Return the rows of what a device holds."""
    parts = shards(trainer)
    divided = f"counted, {parts} parts" if parts > 1 else "counted"
    gathered = f"{divided}; each layer is gathered for its turn" if parts > 1 else divided
    once = f"{data.token_budget:,} tokens"
    rows = [
        Row("weights and buffers", size(found.weights), gathered),
        *([Row("copies for autocast", size(found.copies), "estimated")] if found.copies else []),
        Row("gradients", size(found.gradients), divided),
        Row("optimizer", size(found.optimizer), "counted on one small tensor"),
        _activations(found, once),
        *([Row(f"logits of {once}", size(found.logits), "at most")] if found.logits else []),
        Row("= a training step", size(found.step)),
    ]
    if work.fusion.count:
        way = f"{work.snapshots} adapters side by side" if found.stacked else "one gradient at once"
        rows.append(Row("  a step of fusion", size(found.fusion), f"{way}; snapshots stay on disk"))
    if found.gathered:
        whole = f"{size(found.gathered)} of weights are gathered: whole on each device"
        rows.append(Row("  scoring pairs", size(found.scoring), whole))
    if prod(work.at_once):
        rows_of = "at most {} rows of {} tokens; judges come on top".format(*work.at_once)
        rows.append(Row("  sampling", size(found.sampling), rows_of))
    return [*rows, Row("free there", size(available(trainer.strategy.root_device)), "now")]


def _activations(found: Memory, once: str) -> Row:
    name = f"activations of {once}"
    if found.activations is None:
        return Row(name, "unknown", "not counted: known when the model is loaded, and does not fit")
    by_pass = "measured on a smaller pass, multiplied; logits in it"
    by_config = "estimated from the configuration; trees keep up to a third more"
    return Row(name, size(found.activations), by_pass if found.measured else by_config)


def memory_warning(found: Memory, trainer: Trainer) -> str | None:
    """Return a sentence if a device has not as much memory free as the fit needs."""
    free = available(trainer.strategy.root_device)
    if found.most <= free:
        return None
    return (
        f"{size(found.most)} are needed and {size(free)} free; lower data.token_budget, checkpoint"
        " activations, train adapters, or divide the model over more devices"
    )


def optimizer_bytes(make: Callable[[Any], Any], trained: Iterable[nn.Parameter]) -> int:
    """Return what an optimizer keeps of parameters, from one step on a small one of each dtype.

    Args:
        make: From parameters to an optimizer.
        trained: On any device.
    """
    sizes: dict[torch.dtype, int] = {}
    for parameter in trained:
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return sum(round(count * _state_of(make, dtype)) for dtype, count in sizes.items())


def _state_of(make: Callable[[Any], Any], dtype: torch.dtype) -> float:
    small = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    small.grad = torch.zeros_like(small)
    optimizer = make([small])
    optimizer.step()
    states = [t for t in optimizer.state[small].values() if isinstance(t, torch.Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in states) / small.numel()


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's adapter, 0 for one without."""
    if not isinstance(model, PeftModel):
        return 0
    return sum(t.numel() * t.element_size() for t in policy_state(model).values())


def source_of(module: Any) -> Any:
    """Return where a module's model comes from.

    Raises:
        InputError: If the module has none.
    """
    for name in ("policy_source", "reward_source"):
        if getattr(module, name, None) is not None:
            return getattr(module, name)
    raise InputError(
        f"--dry_run needs a module with a model to load, and {type(module).__name__} has none; set"
        " model.policy or model.reward, or leave --dry_run out"
    )


def shards(trainer: Trainer) -> int:
    """Return over how many devices weights, gradients and optimizer are divided."""
    sharding = isinstance(trainer.strategy, _SHARDING)
    return trainer.num_devices * trainer.num_nodes if sharding else 1


def available(device: torch.device) -> int:
    """Return the free bytes of a device; of the processor, also within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # pages that the system's file cache would give back count as free
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min([*free, *([] if limit == "max" else [int(limit)])], default=1 << 62)


def _logits(model: nn.Module, tokens: int, itemsize: int) -> int:
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if head is None else min(LOGITS_BUDGET, tokens * head.weight.shape[0] * itemsize)
