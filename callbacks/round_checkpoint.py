"""The one checkpoint of a run, complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.files import replacing

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Where a run folder has its checkpoint."""


class FitCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` every N steps and after every epoch of a plain fit.

    Args:
        every_n_steps: Optimizer steps between checkpoints within an epoch; 0 for none.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint every N steps."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self.every_n_steps and stepped and trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(checkpoint_path(trainer), weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint after an epoch."""
        trainer.save_checkpoint(checkpoint_path(trainer), weights_only=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the checkpoint on SIGTERM, which Lightning acts on between two batches."""
        if isinstance(exception, SIGTERMException):
            trainer.save_checkpoint(checkpoint_path(trainer), weights_only=False)


class RoundCheckpoint(RoundCallback, FitCheckpoint):
    """Writes ``checkpoints/last.ckpt`` every N steps and around every round's end.

    Args:
        every_n_steps: Optimizer steps between checkpoints within a round; 0 for none.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        RoundCallback.__init__(self)
        FitCheckpoint.__init__(self, every_n_steps)

    def stages(self) -> dict[str, Stage]:
        """Return the checkpoints before and after the rest of a round's end."""
        return {"protect": self.save, "checkpoint": self.save}

    def save(self, context: RoundContext) -> None:
        """Write the checkpoint, except before the first round, where there is nothing to keep."""
        if context.trainer is not None and context.round_index > 0:
            context.trainer.save_checkpoint(checkpoint_path(context.trainer), weights_only=False)


def checkpoint_path(trainer: Trainer) -> Path:
    """Return where a run's checkpoint is."""
    return Path(trainer.default_root_dir) / CHECKPOINT


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or absent: written beside, flushed, renamed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint in place of the one at ``path``."""
        with replacing(Path(path)) as beside:
            torch.save(checkpoint, beside)
