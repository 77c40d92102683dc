"""The one checkpoint of a run, complete or absent."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.callbacks.stop_signals import StoppedBetweenStagesError
from tpmm_pl.files import replacing, replacing_folder
from tpmm_pl.types import InputError

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
        self.last_model_path = ""
        """The newest checkpoint that this process has written, by Lightning's name."""
        self._last_step = 0
        self._trained = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint every N steps."""
        self._trained = True
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self.every_n_steps and stepped and trainer.global_step % self.every_n_steps == 0:
            self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint after an epoch."""
        self.write(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the checkpoint on SIGTERM, which Lightning acts on between two batches."""
        between_stages = isinstance(exception, StoppedBetweenStagesError)
        if isinstance(exception, SIGTERMException) and not between_stages:
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the checkpoint now; all processes do so together."""
        path = checkpoint_path(trainer)
        # a folder that processes share: the strategy takes the first one's path for all
        shared = writes_folder(trainer.strategy) and processes.is_first()
        with replacing_folder(path) if shared else nullcontext(path) as beside:
            trainer.save_checkpoint(beside, weights_only=False)
        processes.wait()  # a process that ends before has the others killed, by some launchers
        self.last_model_path = str(path)


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
        return {"protect": self.protect, "checkpoint": self.save}

    def protect(self, context: RoundContext) -> None:
        """Write the checkpoint, unless the run has just resumed from it.

        A resumed Trainer counts the epoch as complete before the round's end is: from what it
        would write here it would next ask for batches that the round's end has yet to make.
        """
        if self._trained:
            self.save(context)

    def save(self, context: RoundContext) -> None:
        """Write the checkpoint, except before the first round, where there is nothing to keep."""
        if context.trainer is not None and context.round_index > 0:
            self.write(context.trainer)


def checkpoint_path(trainer: Trainer) -> Path:
    """Return where a run's checkpoint is."""
    return Path(trainer.default_root_dir) / CHECKPOINT


def writes_folder(strategy: Strategy) -> bool:
    """Tell whether a strategy's checkpoint is a folder, a part from each process."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, DeepSpeedStrategy)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or absent: written beside, flushed, renamed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint in place of the one at ``path``."""
        # an open file: torch's own writing does not say that the disk is full
        with replacing(Path(path)) as beside, beside.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; no code in it is run, unless ``weights_only`` is false.

        Raises:
            InputError: If it cannot be read.
        """
        try:
            safe = weights_only is None or weights_only
            return super().load_checkpoint(path, map_location, weights_only=safe)
        except Exception as error:  # of torch, pickle, zip archives and the system
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise InputError(
                f"the checkpoint {path} cannot be read ({reason}); restore it or start over with "
                "--overwrite"
            ) from error
