"""Validation of a reward model on held-out pairs, by domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryCalibrationError

from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.types import InputError, PairBatch, Rewards, RunError


class PairValidation:
    """The validation hooks of a LightningModule whose ``reward`` scores pairs.

    Logs ``eval/<name>/<domain>`` of ``accuracy``, ``margin`` and ``calibration_error``; the domains
    are those of the data's ``domains``, one a validation loader; without any ``in_domain``,
    ``out_of_domain``, ``2``, ``3``, ...
    """

    reward: nn.Module
    trainer: Any
    log: Any

    def on_validation_start(self) -> None:
        """Begin every domain's metrics anew."""
        self._validated = RewardScorer(self.reward)
        device = next(self.reward.parameters()).device
        self._metrics = {name: pair_metrics(device) for name in self._domains()}

    def validation_step(
        self, batch: list[PairBatch], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count held-out pairs of a domain."""
        for micro in batch:
            rewards = self._validated(micro)
            refuse_not_finite(rewards, self.trainer.global_step)
            update_pair_metrics(self._metrics[self._domains()[dataloader_idx]], rewards)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, margin and calibration error of every domain."""
        for domain, metrics in self._metrics.items():
            for name, metric in metrics.items():
                self.log(f"eval/{name}/{domain}", metric.compute(), sync_dist=True)

    def _domains(self) -> list[str]:
        named = list(getattr(getattr(self.trainer, "datamodule", None), "domains", ()))
        loaders = len(self.trainer.num_val_batches)
        return named or ["in_domain", "out_of_domain", *map(str, range(2, loaders))][:loaders]


def pair_metrics(device: torch.device) -> dict[str, Metric]:
    """Return fresh metrics of held-out pairs, for :func:`update_pair_metrics`.

    ``calibration_error`` is the expected difference between the probability that the
    Bradley-Terry model gives to a preference and how often it is right, in ``[0, 1]``.
    """
    metrics = {
        "accuracy": MeanMetric(),
        "margin": MeanMetric(),
        # an even number of bins: in one around 0.5 the two sides of a pair would cancel
        "calibration_error": BinaryCalibrationError(n_bins=20),
    }
    return {name: metric.to(device) for name, metric in metrics.items()}


def update_pair_metrics(metrics: dict[str, Metric], rewards: Rewards) -> None:
    """Count pairs; calibration sees each from both sides, so that both labels occur."""
    margin = rewards.chosen - rewards.rejected
    metrics["accuracy"].update((margin > 0).float())
    metrics["margin"].update(margin)
    preferred = torch.cat([torch.ones_like(margin), torch.zeros_like(margin)]).long()
    metrics["calibration_error"].update(torch.cat([margin, -margin]).sigmoid(), preferred)


def refuse_not_finite(rewards: Rewards, step: int) -> None:
    """Check that all rewards are numbers.

    Raises:
        InputError: If one is NaN or infinite before the first step: the model is at fault.
        RunError: If one is so later: the training is.
    """
    if bool(torch.stack(rewards).isfinite().all()):
        return
    if step == 0:
        raise InputError(
            "rewards of the untrained model are not finite: its weights are broken, or overflow in "
            "float16; check the model, or use float32 or bfloat16"
        )
    raise RunError(
        f"rewards at step {step} are not finite; lower the learning rate, or set "
        "model.gradient_clip_val"
    )
