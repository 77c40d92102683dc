"""Optimizer steps on packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tpmm_pl.types import PairBatch, RunError


class PackedSteps:
    """Takes one optimizer step on several micro-batches; for a LightningModule to inherit.

    The gradient is that of the mean over all pairs, however they are cut into micro-batches; but
    for losses that look at several pairs at once, which see those of one micro-batch.
    """

    gradient_clip_val: float | None
    """Largest norm of the gradient of a step; longer ones are scaled down to it."""
    automatic_optimization = False

    manual_backward: Any
    optimizers: Any
    trainer: Any

    def step(self, batch: Sequence[PairBatch], loss_of: Callable[[PairBatch], Tensor]) -> None:
        """Add up the gradients of all micro-batches, clip, and update.

        Args:
            batch: Each with at least one pair.
            loss_of: From a micro-batch to the mean loss of its pairs.

        Raises:
            RunError: If the memory of the device does not suffice.
        """
        optimizer = self.optimizers()
        optimizer.zero_grad()  # what a callback has left there
        pairs = sum(len(micro.weight) for micro in batch)
        try:
            for number, micro in enumerate(batch, 1):
                with nullcontext() if number == len(batch) else self._unsynced():
                    self.manual_backward(loss_of(micro) * (len(micro.weight) / pairs))
        except torch.OutOfMemoryError as error:
            longest = max(len(micro.tree.tokens) for micro in batch)
            raise RunError(
                f"out of memory at a micro-batch of {longest} tokens; lower data.token_budget or"
                " data.max_length, or checkpoint the model's activations"
            ) from error
        if self.gradient_clip_val:
            self._clip(optimizer, self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()  # the memory is free for what comes between steps

    def _unsynced(self) -> AbstractContextManager[None]:
        # processes average their gradients once a step, with the last micro-batch
        block: Any = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return block()  # type: ignore[no-any-return]

    def _clip(self, optimizer: Any, norm: float) -> None:
        # not self.clip_gradients: it refuses a fused optimizer under mixed precision, and clips
        # what a scaler has scaled; gradients are scaled until the step, and so is the norm here
        precision = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        precision.clip_grad_by_norm(optimizer, norm * (scaler.get_scale() if scaler else 1.0))
