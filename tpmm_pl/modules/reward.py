"""Training a reward model on preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftModel
from torch import Tensor, nn

from tpmm_pl import processes
from tpmm_pl.data.tokens.chat import check_vocabulary
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.sharding import gathered_weights, shard_model
from tpmm_pl.models.source import PolicySource
from tpmm_pl.modules.dpo import SCHEDULES, learning_rate_factor
from tpmm_pl.modules.packed_steps import PackedSteps, at_least_0
from tpmm_pl.modules.pair_validation import PairValidation, refuse_not_finite
from tpmm_pl.moe.routing import Routing, balance_loss, joined, recorded_routing
from tpmm_pl.registry import lookup
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import InputError, PairBatch, Rewards


class RewardModule(PackedSteps, PairValidation, LightningModule):
    """A reward model, dense or a mixture of experts, under the Bradley-Terry loss.

    Args:
        reward: Makes the model to train.
        optimizer: From parameters to an optimizer.
        label_smoothing: The assumed rate of swapped labels, in ``[0, 0.5)``.
        centring: Coefficient of the squared sum of a pair's rewards, which keeps them around 0.
        balance: Coefficient of the experts' balance losses, summed over layers.
        schedule: Of the learning rate over the whole fit.
        warmup: Share of the fit's steps over which the learning rate rises from 0.
        gradient_clip_val: Largest norm of a step's gradient; ``None``: any. In place of the
            Trainer's setting of that name, which knows no steps of several micro-batches.
        skip_non_finite: How many steps of a run may be left out because their loss or gradient is
            not finite; one more ends the run. They are logged as ``skipped_steps``.

    Raises:
        InputError: If a setting is unknown or out of range.
    """

    def __init__(
        self,
        reward: PolicySource,
        optimizer: OptimizerCallable,
        label_smoothing: float = 0.0,
        centring: float = 0.0,
        balance: float = 0.01,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        gradient_clip_val: float | None = None,
        skip_non_finite: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
        if centring < 0 or balance < 0:
            raise InputError(f"centring {centring} and balance {balance} must not be negative")
        if not 0 <= warmup <= 1:
            raise InputError(f"warmup is {warmup}; it is a share of the fit's steps, in [0, 1]")
        lookup("schedule", schedule, SCHEDULES)
        self.reward_source = reward
        self.make_optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.centring = centring
        self.balance = balance
        self.schedule = schedule
        self.warmup = warmup
        self.gradient_clip_val = gradient_clip_val
        self.skip_non_finite = at_least_0(skip_non_finite)
        self.routings: dict[str, Routing] = {}
        """What the routers did in the last training step, by layer; empty for a dense model."""
        self.reward: nn.Module

    def configure_model(self) -> None:
        """Load the reward model, once."""
        if not hasattr(self, "reward"):
            reward = self.reward_source.load_model()
            embedding: Any = reward.get_input_embeddings()
            check_vocabulary(self.reward_source.load_tokenizer(), embedding.weight.shape[0])
            self.reward = reward
            # an adapter's checkpoint leaves the frozen base model out
            self.strict_loading = not isinstance(self.reward, PeftModel)
            if self.device_mesh is not None:
                shard_model(self.reward, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that train."""
        return self.make_optimizer(p for p in self.reward.parameters() if p.requires_grad)

    def on_fit_start(self) -> None:
        """Take the model's backbone and head apart once."""
        with gathered_weights(self.reward):
            self._scorer = RewardScorer(self.reward)

    def training_step(self, batch: list[PairBatch], batch_idx: int) -> Tensor:
        """Take an optimizer step on the weighted mean loss, the experts' balance included."""
        step = self.global_step
        losses: list[Tensor] = []
        ranked: list[Tensor] = []
        scored: list[Rewards] = []
        routed: list[dict[str, Routing]] = []

        def loss_of(micro: PairBatch) -> Tensor:
            numbers = run_seed(), step, batch_idx, self.global_rank, len(losses)
            seen = self._scorer.seen(micro.tree)
            with recorded_routing(self.reward, seen, generator_of(*numbers)) as routings:
                rewards = self._scorer(micro)
            ranking = self._losses(rewards, micro.margin) * micro.weight
            ranked.append(ranking.detach())
            loss = ranking.mean()
            if routings:
                loss = loss + self.balance * total_balance_loss(routings)
            losses.append(loss.detach() * len(micro.weight))
            scored.append(Rewards(*(values.detach() for values in rewards)))
            routed.append({name: Routing(*map(_detached, r)) for name, r in routings.items()})
            return loss

        self.step(batch, loss_of, ranked, batch_idx)
        self.routings = {name: joined([r[name] for r in routed]) for name in routed[0]}
        rewards = Rewards(*map(torch.cat, zip(*scored, strict=True)))
        if step == 0:
            # later it is the training that is at fault, and the step is left out; of all processes
            # alike, which a sum that is no number tells
            sums = processes.mean(torch.stack([scores.sum() for scores in rewards]))
            refuse_not_finite(Rewards(*sums), step)
        pairs = len(rewards.chosen)
        metrics = {"loss": torch.stack(losses).sum() / pairs, **reward_metrics(rewards)}
        if self.routings:
            metrics["balance_loss"] = total_balance_loss(self.routings)
        extremes = processes.largest(torch.stack([metrics["max_reward"], -metrics["min_reward"]]))
        metrics = self.averaged(metrics)
        metrics |= {"max_reward": extremes[0], "min_reward": -extremes[1]}
        self.log_dict(metrics, batch_size=pairs)
        return metrics["loss"]

    def _losses(self, rewards: Rewards, margin: Tensor) -> Tensor:
        return bradley_terry_loss(
            *rewards,
            margin=margin,
            label_smoothing=self.label_smoothing,
            centring=self.centring,
        )

    def on_train_batch_start(self, batch: list[PairBatch], batch_idx: int) -> None:
        """Set the learning rate from the position within the fit."""
        if self.schedule == "constant" and not self.warmup:
            return
        done = self.global_step / self.trainer.estimated_stepping_batches
        factor = learning_rate_factor(done, self.schedule, self.warmup)
        for group in self.trainer.optimizers[0].param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen base model out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if not self.strict_loading:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained}


def total_balance_loss(routings: Mapping[str, Routing]) -> Tensor:
    """Return the balance losses of all layers, added up; a scalar."""
    return torch.stack([balance_loss(routing) for routing in routings.values()]).sum()


def reward_metrics(rewards: Rewards) -> dict[str, Tensor]:
    """Return what TRL's ``RewardTrainer`` logs of a batch, by its names; scalars."""
    chosen, rejected = (scores.detach() for scores in rewards)
    both = torch.cat([chosen, rejected])
    return {
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "min_reward": both.min(),
        "mean_reward": both.mean(),
        "max_reward": both.max(),
    }


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator that depends on the numbers only."""
    digest = sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
