"""Training a policy on preference pairs against stored reference log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftModel
from torch import Tensor, nn

from tpmm_pl.data.tokens.chat import check_vocabulary
from tpmm_pl.losses import log_ratios, per_token, preference_loss
from tpmm_pl.models.scoring import PairScorer, pair_tokens
from tpmm_pl.models.sharding import gathered_weights, shard_model
from tpmm_pl.models.source import PolicySource
from tpmm_pl.modules.packed_steps import PackedSteps, at_least_0
from tpmm_pl.registry import lookup
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, PairBatch, PairLogps, Recipe

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda left: 1.0,
    "linear": lambda left: left,
    "cosine": lambda left: (1 - cos(pi * left)) / 2,
}
"""Factors on the learning rate by the share of a round that is left after the warm-up."""


class DPOModule(PackedSteps, LightningModule):
    """Direct preference optimisation of a policy, round after round in one fit.

    The reference is no second model: its log-probabilities come with the pairs, computed once a
    round. Callbacks say which recipe they belong to through :meth:`use_reference`.

    Args:
        policy: Makes the starting policy.
        optimizer: From parameters to an optimizer; its state is reset after every round.
        rounds: T; extend a finished run by raising it.
        epochs_per_round: Passes over a round's pairs.
        loss: A name (``sigmoid``, ``rdpo``, ``simpo``, ... or TRL's), a list of names to add, or
            names with weights: ``{sigmoid: 0.8, sft: 0.2}``.
        beta: Strength of the pull towards the reference, ``> 0``; scale of ``simpo``'s reward,
            weight of ``orpo``'s odds ratio. It scales the logged rewards whatever the loss is.
        label_smoothing: Rate of swapped labels that ``cdpo``, ``rdpo``, ``exo``, ``aot`` and
            ``aot_unpaired`` assume.
        simpo_gamma: Margin of ``simpo``; 0.5 if not given.
        discopop_tau: Temperature of ``discopop``; 0.05 if not given.
        schedule: Of the learning rate within a round.
        warmup: Share of a round's steps over which the learning rate rises from 0.
        gradient_clip_val: Largest norm of a step's gradient; ``None``: any. In place of the
            Trainer's setting of that name, which knows no steps of several micro-batches.
        skip_non_finite: How many steps of a run may be left out because their loss or gradient is
            not finite; one more ends the run. They are logged as ``skipped_steps``.

    Raises:
        InputError: If a setting is unknown or out of range.
    """

    def __init__(
        self,
        policy: PolicySource,
        optimizer: OptimizerCallable,
        rounds: int = 8,
        epochs_per_round: int = 1,
        loss: dict[str, float] | list[str] | str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        simpo_gamma: float | None = None,
        discopop_tau: float | None = None,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        gradient_clip_val: float | None = None,
        skip_non_finite: int = 0,
    ) -> None:
        super().__init__()
        if rounds < 1 or epochs_per_round < 1:
            raise InputError(
                f"rounds {rounds} and epochs_per_round {epochs_per_round} must be at least 1"
            )
        if not 0 <= warmup <= 1:
            raise InputError(f"warmup is {warmup}; it is a share of a round's steps, in [0, 1]")
        lookup("schedule", schedule, SCHEDULES)
        self.policy_source = policy
        self.make_optimizer = optimizer
        self.rounds = rounds
        self.epochs_per_round = epochs_per_round
        self.loss = preference_loss(
            loss,
            beta=beta,
            label_smoothing=label_smoothing,
            simpo_gamma=simpo_gamma,
            discopop_tau=discopop_tau,
        )
        self.beta = beta
        self.schedule = schedule
        self.warmup = warmup
        self.gradient_clip_val = gradient_clip_val
        self.skip_non_finite = at_least_0(skip_non_finite)
        self.reference: Recipe | None = None
        self.policy: nn.Module

    def configure_model(self) -> None:
        """Load the starting policy, once."""
        if not hasattr(self, "policy"):
            policy = self.policy_source.load_model()
            embedding: Any = policy.get_input_embeddings()
            check_vocabulary(self.policy_source.load_tokenizer(), embedding.weight.shape[0])
            self.policy = policy
            # an adapter's checkpoint leaves the frozen base model out
            self.strict_loading = not isinstance(self.policy, PeftModel)
            if self.device_mesh is not None:
                shard_model(self.policy, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that train."""
        return self.make_optimizer(p for p in self.policy.parameters() if p.requires_grad)

    def use_reference(self, recipe: Recipe | None, store: TrajectoryStore) -> None:
        """Take note of the recipe that the pairs' reference log-probabilities come from."""
        self.reference = recipe

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the pairs' reference log-probabilities."""
        return self.loss.needs_reference

    def on_fit_start(self) -> None:
        """Take the policy's backbone and head apart once; say so if there is no reference."""
        with gathered_weights(self.policy):
            self._scorer = PairScorer(self.policy)
        if not self.needs_reference:
            self.print(
                f"loss {self.loss}: no reference, the rounds' pairs are not scored under one"
            )

    def training_step(self, batch: list[PairBatch], batch_idx: int) -> Tensor:
        """Take an optimizer step on the weighted mean loss of all pairs; return that loss."""
        parts: list[dict[str, Tensor]] = []
        scored: list[PairLogps] = []
        totals: list[Tensor] = []

        def loss_of(micro: PairBatch) -> Tensor:
            logps = self._scorer(micro)
            losses = self.loss.parts(logps, micro.reference, pair_tokens(micro))
            weighted = {name: values * micro.weight for name, values in losses.items()}
            parts.append({name: values.detach() for name, values in weighted.items()})
            scored.append(PairLogps(*(values.detach() for values in logps)))
            totals.append(self.loss.total(parts[-1]))
            return self.loss.total({name: values.mean() for name, values in weighted.items()})

        self.step(batch, loss_of, totals, batch_idx)
        means = {name: torch.cat([part[name] for part in parts]).mean() for name in parts[0]}
        named = {f"loss/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
        reference = _joined([micro.reference for micro in batch])
        tokens = _joined([pair_tokens(micro) for micro in batch])
        metrics = {"loss": self.loss.total(means), **named}
        metrics |= self._rewards(_joined(scored), reference, tokens)
        metrics = self.averaged(metrics)
        self.log_dict(metrics, batch_size=len(reference.chosen))
        return metrics["loss"]

    def on_train_batch_start(self, batch: list[PairBatch], batch_idx: int) -> None:
        """Set the learning rate from the position within the round."""
        if self.schedule == "constant" and not self.warmup:
            return
        steps = max(1, int(self.trainer.num_training_batches) * self.epochs_per_round)
        epoch_in_round = self.current_epoch % self.epochs_per_round
        done = epoch_in_round * int(self.trainer.num_training_batches) + batch_idx
        factor = learning_rate_factor(done / steps, self.schedule, self.warmup)
        for group in self.trainer.optimizers[0].param_groups:
            group.setdefault("round_lr", group["lr"])
            group["lr"] = group["round_lr"] * factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen base model out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if not self.strict_loading:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained}

    def _rewards(
        self, logps: PairLogps, reference: PairLogps, tokens: PairLogps
    ) -> dict[str, Tensor]:
        scores = log_ratios(logps, reference) if self.needs_reference else per_token(logps, tokens)
        margin = self.beta * (scores.chosen - scores.rejected)
        return {
            "rewards/chosen": self.beta * scores.chosen.mean(),
            "rewards/rejected": self.beta * scores.rejected.mean(),
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (margin > 0).float().mean(),
            "logps/chosen": logps.chosen.mean(),
            "logps/rejected": logps.rejected.mean(),
        }


def _joined(parts: Sequence[PairLogps]) -> PairLogps:
    return PairLogps(*(torch.cat(values) for values in zip(*parts, strict=True)))


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Return the factor on the learning rate at a share of a round, in ``[0, 1]``.

    Args:
        progress: Share of the round's steps done, in ``[0, 1)``.
        schedule: ``constant``, or ``linear`` or ``cosine`` down to 0 at the round's end.
        warmup: Share of the steps over which the factor rises from 0 to 1 first.
    """
    if progress < warmup:
        return progress / warmup
    return SCHEDULES[schedule](1 - (progress - warmup) / (1 - warmup))
