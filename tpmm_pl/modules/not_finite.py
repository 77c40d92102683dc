"""Optimizer steps whose loss or gradient is not finite: left out, counted, told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from tpmm_pl.data.batching import PairLoader
from tpmm_pl.rounds import RoundSchedule

_NAMED = 4
"""Pairs that a sentence names; of more it gives the number."""


@dataclass(frozen=True)
class Step:
    """An optimizer step, and what tells whether it was left out; read later than taken."""

    epoch: int
    number: int
    batch: int
    left_out: Tensor
    """Whether the gradient was not finite; a scalar on the device."""
    losses: Sequence[Tensor]
    """Of each pair, ``(B,)`` a micro-batch."""


def poisoned(loss: Tensor) -> Tensor:
    """Return a loss whose gradient is not finite wherever the loss itself is not.

    Averaged over processes, the gradient then tells all of them alike. A finite loss is as it was,
    and so is its gradient, bit for bit.
    """
    return loss * (loss.detach() * 0 + 1)


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Tell whether the norm of all tensors together is no finite number; a scalar, not read."""
    norm = torch.nn.utils.get_total_norm(tensors)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return ~whole.isfinite()


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that an optimizer would step along."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None]


def hold_back(optimizer: Any, left_out: Tensor) -> None:
    """Let the coming step of an optimizer change nothing where ``left_out`` says so.

    A fused optimizer decides on the device, as it does for a scaler of gradients; for another one
    the value is read, which waits for the device.

    Args:
        optimizer: With its gradients.
        left_out: A scalar on the device.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, left_out.float()
    elif bool(left_out):
        optimizer.zero_grad()  # parameters without a gradient stay as they are


def account(step: Step, trainer: Trainer, epochs_per_round: int | None) -> str:
    """Return the sentence about a step that ends a run.

    Args:
        step: Which.
        trainer: Has the loader of the step's batch; a :class:`PairLoader` knows its pairs.
        epochs_per_round: Of a module with rounds.
    """
    losses = [loss for part in step.losses for loss in part.tolist()]
    broken = [index for index, loss in enumerate(losses) if not isfinite(loss)]
    what = "the gradient"
    if broken:
        what = f"the loss of {_named(broken, step, trainer.train_dataloader)}"
    within = f"epoch {step.epoch}"
    if epochs_per_round is not None:
        within += f", round {RoundSchedule(epochs_per_round).round_of(step.epoch)}"
    return (
        f"{what} is not finite in optimizer step {step.number}, batch {step.batch} of {within};"
        f" {way_out(trainer)}"
    )


def way_out(trainer: Trainer) -> str:
    """Return what can be done, and from where."""
    settings = "set model.gradient_clip_val or model.skip_non_finite"
    written = [getattr(c, "last_model_path", "") for c in trainer.checkpoint_callbacks]
    checkpoint = next(filter(None, written), trainer.ckpt_path)
    if checkpoint:
        settings += " and go on with --ckpt_path last"
        settings = f"the last good state is {checkpoint}: {settings}"
    return f"{settings}, or start over with a lower learning rate"


def _named(broken: Sequence[int], step: Step, loader: Any) -> str:
    pairs = "pair" if len(broken) == 1 else "pairs"
    names = [str(index) for index in broken]
    if isinstance(loader, PairLoader):
        rows = loader.rows_of(step.batch)
        prompts = loader.dataset.table.column("prompt_id").tolist()  # type: ignore[attr-defined]
        names = [f"{rows[index]} (prompt {prompts[rows[index]]})" for index in broken]
    listed = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(broken)} {pairs}, {'row' if len(broken) == 1 else 'rows'} {listed},"
