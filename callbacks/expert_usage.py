"""How a mixture of experts uses its experts while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tpmm_pl import processes
from tpmm_pl.moe.routing import Routing
from tpmm_pl.types import InputError


@runtime_checkable
class HasRoutings(Protocol):
    """Anything that keeps what its layers did with the tokens of the last step."""

    routings: Mapping[str, Routing]


class ExpertUsage(Callback):
    """Logs load, gate entropy and imbalance of every layer, and warns of experts that are dead.

    Of several processes the first logs what its own share of a step has used; an expert is dead
    where no process has given it a token.

    Names are ``experts/<layer>/load_<expert>`` (share of the routed assignments, 1 / experts when
    even), ``experts/<layer>/load_cv`` (its coefficient of variation, 0 when even) and
    ``experts/<layer>/gate_entropy`` (nats, at most the log of the routed experts); layers and
    routed experts count from 0.

    Args:
        every_n_steps: Optimizer steps between entries.
        dead_after: An expert without a token in so many steps is called dead.

    Raises:
        InputError: If a number is not positive.
    """

    def __init__(self, every_n_steps: int = 10, dead_after: int = 100) -> None:
        if every_n_steps < 1 or dead_after < 1:
            raise InputError(
                f"every_n_steps {every_n_steps} and dead_after {dead_after} must be at least 1"
            )
        self.every_n_steps = every_n_steps
        self.dead_after = dead_after
        self._last_step = 0
        self._steps = 0
        self._counts: dict[str, Tensor] = {}
        self._warned: set[tuple[str, int]] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, HasRoutings):
            raise InputError(f"{type(pl_module).__name__} has no attribute `routings` to log")
        routings = pl_module.routings
        self._count(routings)
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if not stepped:
            return  # gradients are being accumulated
        if trainer.global_step % self.every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(usage_metrics(routings), step=trainer.global_step)
        for layer, expert in self.dead_experts():
            warnings.warn(
                f"expert {expert} of {layer} got no token in {self.dead_after} steps; raise the "
                "module's `balance`, or use fewer experts",
                stacklevel=2,
            )

    def dead_experts(self) -> list[tuple[str, int]]:
        """End a step; return the (layer, routed expert) found dead in its window, each once."""
        self._steps += 1
        if self._steps < self.dead_after:
            return []
        found = [
            (layer, expert)
            for layer, counts in self._counts.items()
            for expert in (processes.mean(counts.double()) == 0).nonzero().flatten().tolist()
        ]
        new = [place for place in found if place not in self._warned]
        self._warned |= set(new)
        self._steps, self._counts = 0, {}
        return new

    def _count(self, routings: Mapping[str, Routing]) -> None:
        for layer, routing in routings.items():
            self._counts[layer] = self._counts.get(layer, 0) + routing.counts.detach()


def usage_metrics(routings: Mapping[str, Routing]) -> dict[str, float]:
    """Return load, its coefficient of variation and gate entropy by layer.

    Args:
        routings: What the layers did with the tokens of a step, in the model's order.
    """
    metrics: dict[str, float] = {}
    for number, routing in enumerate(routings.values()):
        counts = routing.counts.detach().double()
        area = f"experts/{number:02d}"
        shares = (counts / counts.sum().clamp(min=1)).tolist()
        metrics |= {f"{area}/load_{expert:02d}": share for expert, share in enumerate(shares)}
        deviation = counts.std(correction=0) / counts.mean().clamp(min=torch.finfo().tiny)
        metrics[f"{area}/load_cv"] = float(deviation)
        metrics[f"{area}/gate_entropy"] = float(routing.gate_entropy)
    return metrics
