"""Supervised fine-tuning: the likelihood of demonstrated completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from tpmm_pl.types import IGNORE_INDEX


class DemonstrationBatch(NamedTuple):
    """Prompts with the completions to learn, each ``(N, T)`` int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    """``IGNORE_INDEX`` marks prompt and padding."""


class SFTModule(LightningModule):
    """Minimises the mean negative log-likelihood of the completion tokens, in nats.

    Args:
        model: A causal language model.
        optimizer: Makes the optimizer of its parameters.
        total_steps: Step at which the learning rate has fallen to 0 along a cosine; ``None``
            keeps it constant throughout.
        warmup_steps: Steps over which it first rises linearly, counted in ``total_steps``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        total_steps: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.policy = model
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a float32 scalar."""
        output = self.policy(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        loss = completion_nll(output.logits, batch.labels)
        self.log("sft/loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with a schedule stepped once a batch if there is one."""
        optimizer = self.optimizer(self.policy.parameters())
        if self.total_steps is None:
            return optimizer
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def completion_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the negative log-likelihood over all labelled tokens of a batch.

    The shift happens here: position ``t`` of ``logits`` predicts position ``t + 1`` of ``labels``.
    The value is ``log V`` for constant logits.

    Args:
        logits: Unnormalised scores, ``(N, T, V)``, any float dtype; reduced in float32.
        labels: Token ids, ``(N, T)``; ``IGNORE_INDEX`` marks prompt and padding.

    Returns:
        The loss in nats a token, a float32 scalar; NaN when no token is labelled.
    """
    shifted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
