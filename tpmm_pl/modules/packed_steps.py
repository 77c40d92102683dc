"""Optimizer steps on packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tpmm_pl import processes
from tpmm_pl.models.sharding import average_gradients
from tpmm_pl.modules.not_finite import (
    Step,
    account,
    gradients,
    hold_back,
    not_finite,
    poisoned,
    way_out,
)
from tpmm_pl.types import InputError, PairBatch, RunError


class PackedSteps:
    """Takes one optimizer step on several micro-batches; for a LightningModule to inherit.

    The gradient is that of the mean over all pairs, however they are cut into micro-batches; but
    for losses that look at several pairs at once, which see those of one micro-batch.

    A step whose loss or gradient is not finite is left out, in all processes alike. More of them
    than ``skip_non_finite`` end the run, and so do weights that are not finite: at the latest where
    the logger looks at values, and always before a checkpoint or the end of an epoch.
    """

    gradient_clip_val: float | None
    """Largest norm of the gradient of a step; longer ones are scaled down to it."""
    skip_non_finite: int
    """How many steps of a run may be left out."""
    skipped_steps = 0
    """How many were, as far as values have been looked at."""
    automatic_optimization = False

    current_epoch: Any
    global_step: Any
    log: Any
    manual_backward: Any
    optimizers: Any
    parameters: Any
    trainer: Any

    def step(
        self,
        batch: Sequence[PairBatch],
        loss_of: Callable[[PairBatch], Tensor],
        losses: Sequence[Tensor],
        batch_idx: int,
    ) -> None:
        """Add up the gradients of all micro-batches, clip, and update.

        Args:
            batch: Each with at least one pair.
            loss_of: From a micro-batch to the mean loss of its pairs.
            losses: Of each pair, ``(B,)`` a micro-batch; here once ``loss_of`` was called.
            batch_idx: Of the epoch, to tell which step it was.

        Raises:
            RunError: If the memory of the device does not suffice.
        """
        optimizer = self.optimizers()
        optimizer.zero_grad()  # what a callback has left there
        pairs = sum(len(micro.weight) for micro in batch)
        try:
            for number, micro in enumerate(batch, 1):
                with nullcontext() if number == len(batch) else self._unsynced():
                    self.manual_backward(poisoned(loss_of(micro)) * (len(micro.weight) / pairs))
        except torch.OutOfMemoryError as error:
            longest = max(len(micro.tree.tokens) for micro in batch)
            raise RunError(
                f"out of memory at a micro-batch of {longest} tokens; lower data.token_budget or"
                " data.max_length, or checkpoint the model's activations"
            ) from error
        average_gradients(self.trainer.lightning_module)
        left_out = not_finite(gradients(optimizer.optimizer))
        if self.gradient_clip_val:
            self._clip(optimizer, self.gradient_clip_val)
        if self._scaler is not None:
            # leaves steps out itself, and has to where it tries how far it can scale
            left_out = left_out & (self._scaler.get_scale() <= 1)
        step = self.current_epoch, self.global_step, batch_idx
        self._unread.append(Step(*step, left_out, losses))
        optimizer.step()
        optimizer.zero_grad()  # the memory is free for what comes between steps

    def averaged(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of scalars over processes, each of which has as many pairs of a step."""
        if processes.count() == 1:
            return dict(metrics)
        means = processes.mean(torch.stack([value.detach() for value in metrics.values()]))
        return dict(zip(metrics, means.unbind(), strict=True))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out if its gradient is not finite."""
        if self._scaler is None:
            hold_back(optimizer, self._unread[-1].left_out)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at what was left out, not more often than the logger looks at values."""
        every = self.trainer.log_every_n_steps
        if self.trainer.is_last_batch:
            self._look()
            self._refuse_weights()
        elif every and (self.global_step - 1) % every == 0:
            self._look()
        if self.skip_non_finite:
            self.log("skipped_steps", float(self.skipped_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write what is not finite; count on after a resume."""
        self._look()
        self._refuse_weights()
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def _unsynced(self) -> AbstractContextManager[None]:
        # processes average their gradients once a step, with the last micro-batch
        block: Any = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return block()  # type: ignore[no-any-return]

    @cached_property
    def _unread(self) -> list[Step]:
        return []

    def _look(self) -> None:
        steps = self._unread.copy()
        self._unread.clear()
        flags = torch.stack([step.left_out for step in steps]).tolist() if steps else []
        for step, left_out in zip(steps, flags, strict=True):
            self.skipped_steps += left_out
            if self.skipped_steps > self.skip_non_finite:
                epochs_per_round = getattr(self, "epochs_per_round", None)
                raise RunError(account(step, self.trainer, epochs_per_round))

    def _refuse_weights(self) -> None:
        weights = [p.detach() for p in self.parameters() if p.requires_grad]
        if bool(not_finite(weights)):
            step = self.global_step - 1
            raise RunError(
                f"the weights are not finite after optimizer step {step}; {way_out(self.trainer)}"
            )

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _clip(self, optimizer: Any, norm: float) -> None:
        # not self.clip_gradients: it refuses a fused optimizer under mixed precision, and clips
        # what a scaler has scaled; gradients are scaled until the step, and so is the norm here
        scale = self._scaler.get_scale() if self._scaler else 1.0
        self.trainer.precision_plugin.clip_grad_by_norm(optimizer, norm * scale)


def at_least_0(skip_non_finite: int) -> int:
    """Return the number of steps that may be left out.

    Raises:
        InputError: If it is negative.
    """
    if skip_non_finite < 0:
        raise InputError(f"skip_non_finite is {skip_non_finite}; it must not be negative")
    return skip_non_finite
