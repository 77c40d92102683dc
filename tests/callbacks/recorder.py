"""What a fit did, written down by a callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Recorder(Callback):
    """Losses, learning rates and what every epoch started from."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.rates: list[list[float]] = []
        self.starts: list[dict[str, Tensor]] = []
        self.fresh: list[bool] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy: Any = pl_module.policy
        self.losses.append([])
        self.rates.append([])
        self.starts.append({name: p.detach().clone() for name, p in policy.named_parameters()})
        states = trainer.optimizers[0].state.values()
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
        self.fresh.append(not any(bool(tensor.any()) for tensor in tensors))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses[-1].append(float(outputs["loss"]))
        self.rates[-1].append(float(trainer.optimizers[0].param_groups[0]["lr"]))
