"""Learning the coefficients of a merge from preferences."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tpmm_pl import processes
from tpmm_pl.files import write_text
from tpmm_pl.losses import dpo_loss, per_token, simpo_loss
from tpmm_pl.merging import check_grouping
from tpmm_pl.models.scoring import PairScorer, pair_tokens
from tpmm_pl.models.sharding import gathered_weights
from tpmm_pl.models.source import PolicySource
from tpmm_pl.models.weights import streamed_merge
from tpmm_pl.registry import lookup
from tpmm_pl.streaming import StreamedMerge
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, PairBatch, PairLogps, Recipe, Rewards

CONSTRAINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "simplex": lambda weights: weights.softmax(-1),
    "affine": lambda weights: weights - weights.mean(-1, keepdim=True) + 1 / weights.shape[-1],
}
"""From free parameters to coefficients, ``(G, K)``; every row sums to 1, zeros give the average."""

Objective = Callable[[Any, PairBatch, float], Tensor]
"""From what the merged model says of a batch of pairs, the batch and beta to ``(B,)`` losses."""


def scorer_dpo(merged: PairLogps, batch: PairBatch, beta: float) -> Tensor:
    r"""Preference loss of the merged model as the SCORER, ``(B,)`` nats.

    .. math:: -\log\sigma(\beta_f (D(\theta_{merge}) - D(\theta_0)))

    :math:`D` is the log-probability of chosen minus rejected. In the reference's slot of the DPO
    loss the same merge would be taught to prefer the rejected answers.

    Args:
        merged: Log-probabilities under the merge, each ``(B,)``.
        batch: Its ``reference`` holds those under the fixed first snapshot.
        beta: :math:`\beta_f`.
    """
    return dpo_loss(merged, batch.reference, beta=beta)


def length_normalised_ranking(merged: PairLogps, batch: PairBatch, beta: float) -> Tensor:
    r"""Ranking loss on log-probabilities a token, ``(B,)``, without a reference.

    .. math:: -\log\sigma(\beta (\log\pi_c / |c| - \log\pi_r / |r|))
    """
    return simpo_loss(per_token(merged, pair_tokens(batch)), beta=beta, gamma=0.0)


def chosen_nll(merged: PairLogps, batch: PairBatch, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen completion a token, ``(B,)`` nats; no ``beta``."""
    return -per_token(merged, pair_tokens(batch)).chosen


OBJECTIVES: dict[str, Objective] = {
    "dpo": scorer_dpo,
    "ranking": length_normalised_ranking,
    "nll": chosen_nll,
}


@dataclass(frozen=True)
class FusionSettings:
    """How coefficients are learned.

    Args:
        objective: ``dpo``, ``ranking`` or ``nll``.
        beta: Scale of the objective, ``> 0``.
        constraint: ``simplex`` (softmax) or ``affine`` (rows sum to 1, signs free).
        grouping: ``model``, ``layer``, ``block`` or ``tensor``: who shares coefficients.
        lr: Of Adam on the coefficients' parameters; 0.3 for a simplex, 0.02 for affine ones if
            not given. Rates usual for weights never leave the plain average.
        steps: At most so many updates.
        batch_size: Pairs a step.
        tolerance: The fit ends when no coefficient moved by more within ``patience`` steps.
        patience: See ``tolerance``, in steps.

    Raises:
        InputError: If a name is unknown or a number out of range.
    """

    objective: str = "dpo"
    beta: float = 0.1
    constraint: Literal["simplex", "affine"] = "simplex"
    grouping: str = "model"
    lr: float | None = None
    steps: int = 15
    batch_size: int = 64
    tolerance: float = 1e-3
    patience: int = 5

    def __post_init__(self) -> None:
        """Check names and ranges."""
        lookup("fusion objective", self.objective, OBJECTIVES)
        check_grouping(self.grouping)
        lookup("fusion constraint", self.constraint, CONSTRAINTS)
        rates = [self.beta] if self.lr is None else [self.beta, self.lr]
        if min(rates) <= 0 or self.steps < 1 or self.batch_size < 1:
            raise InputError(f"beta, lr, steps and batch_size of a fusion must be positive: {self}")

    @property
    def learning_rate(self) -> float:
        """The learning rate that is used."""
        return self.lr or (0.3 if self.constraint == "simplex" else 0.02)


class FusionWeights(LightningModule):
    r"""Coefficients of a merge, learned on held-out pairs; a fresh module is the plain average.

    The policies stay frozen on disk. A step writes the merge into the policy's module, runs one
    backward pass there and turns the gradient into coefficients' gradients by dot products
    (:class:`tpmm_pl.streaming.StreamedMerge`). Trains in a Trainer (``configs/fusion.yaml``) or
    inside another fit, after :meth:`bind`.

    Args:
        settings: Objective, constraint, groups and the optimizer's numbers.
        policy: Makes a module to merge into, for a fit of its own.
        run: Folder of a finished run, for a fit of its own.
    """

    def __init__(
        self,
        settings: FusionSettings | None = None,
        policy: PolicySource | None = None,
        run: Path | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings or FusionSettings()
        self.policy_source = policy
        self.run = run
        self.objective: Objective = OBJECTIVES[self.settings.objective]
        self.constraint = CONSTRAINTS[self.settings.constraint]
        self.losses: list[float] = []
        self.path: list[Tensor] = []
        self.weights: nn.Parameter

    def bind(
        self, policy: nn.Module, store: TrajectoryStore, snapshots: tuple[int, ...]
    ) -> FusionWeights:
        """Attach the sources and the module that the merge is written into.

        Args:
            policy: Its weights are overwritten by every step; not registered as a submodule.
            store: Holds the snapshots.
            snapshots: Which rounds, oldest first, K of them.

        Returns:
            Itself, with fresh coefficients: the plain average.
        """
        merge, groups = streamed_merge(policy, store, snapshots, self.settings.grouping)
        start = torch.zeros(len(groups), len(snapshots))
        with gathered_weights(policy):
            scorer = PairScorer(policy)
        self.attach(merge, groups, scorer, snapshots, start)
        return self

    def attach(
        self,
        merge: StreamedMerge,
        groups: tuple[str, ...],
        scorer: Callable[[PairBatch], PairLogps | Rewards],
        sources: tuple[int, ...],
        start: Tensor,
    ) -> None:
        """Attach any merge inside a model, and what scores pairs under that model.

        Args:
            merge: Writes coefficients into the model, K sources and G groups.
            groups: Their names.
            scorer: From a batch to what the objective takes.
            sources: Numbers of the sources, in the merge's order.
            start: Free parameters of the coefficients, a row a group; zeros: the plain average.
        """
        self.merge, self.groups, self.scorer, self.snapshots = merge, groups, scorer, sources
        self.weights = nn.Parameter(start.float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusionWeights:
        # steps of a coefficient are lost in bfloat16, whatever precision the merged model has
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def configure_model(self) -> None:
        """Load what a fit of its own works on: the finished trajectory of ``run``."""
        if hasattr(self, "weights"):
            return
        if self.run is None or self.policy_source is None:
            raise InputError("FusionWeights needs `run` (a finished run's folder) and `policy`")
        store = TrajectoryStore(self.run / "trajectory")
        rounds = tuple(record.round for record in store.rounds if record.snapshot)
        if not rounds:
            raise InputError(f"{self.run} holds no trajectory; give the folder of a finished run")
        policy: nn.Module = self.policy_source.load_model()
        # not self.device: the Trainer moves this module only after the hook
        self.bind(policy.to(self.trainer.strategy.root_device), store, rounds)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on the coefficients' parameters."""
        return torch.optim.Adam([self.weights], lr=self.settings.learning_rate)

    def coefficients(self) -> Tensor:
        """Return the coefficients, ``(G, K)`` float32; every row sums to 1."""
        return self.constraint(self.weights)

    def training_step(self, batch: list[PairBatch], batch_idx: int) -> None:
        """Update the coefficients on a batch of held-out pairs, this process's share of a step."""
        coefficients = self.coefficients()
        self.merge.write(coefficients)
        pairs = sum(len(micro.weight) for micro in batch)
        loss = torch.zeros((), dtype=torch.float32, device=batch[0].weight.device)
        with self.merge.gradient() as gradient:
            for micro in batch:
                losses = self.objective(self.scorer(micro), micro, self.settings.beta)
                share = (losses * micro.weight).sum() / pairs
                self.manual_backward(share)
                loss += share.detach()
        joint = processes.mean(torch.cat([gradient.flatten(), loss.double().cpu()[None]]))
        gradient, loss = joint[:-1].view_as(gradient), joint[-1]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        coefficients.backward(gradient.to(coefficients))
        optimizer.step()  # type: ignore[union-attr]
        self.losses.append(float(loss))
        self.path.append(self.coefficients().detach().clone())
        self.log("fusion/loss", loss, batch_size=pairs)

    def on_train_end(self) -> None:
        """Write what a fit of its own has learned to ``recipe.json`` in the run's folder."""
        if self.trainer.is_global_zero:
            recipe = self.recipe()
            if (sentence := self.warning()) is not None:
                warnings.warn(sentence, stacklevel=2)
            content = {**recipe.to_json(), "loss": self.losses}
            write_text(
                Path(self.trainer.default_root_dir) / "recipe.json", json.dumps(content, indent=1)
            )

    @property
    def finished(self) -> bool:
        """Whether the coefficients have come to rest."""
        if len(self.path) <= self.settings.patience:
            return False
        moved = (self.path[-1] - self.path[-1 - self.settings.patience]).abs().max()
        return float(moved) < self.settings.tolerance

    def on_train_batch_end(self, *_: object) -> None:
        """End a fit of its own when the coefficients have come to rest."""
        self.trainer.should_stop = self.trainer.should_stop or self.finished

    def warning(self) -> str | None:
        """Return a sentence if the coefficients did not move or collapsed, else ``None``."""
        return fit_warning(self.recipe())

    def recipe(self) -> Recipe:
        """Return the learned merge."""
        rows = self.coefficients().detach().double()
        rows = rows / rows.sum(-1, keepdim=True)
        return Recipe(
            "learned",
            self.snapshots,
            tuple(tuple(row) for row in rows.tolist()),
            self.settings.grouping,
            self.groups,
        )


def fit_warning(recipe: Recipe, what: str = "snapshot of round") -> str | None:
    """Return a sentence if learned coefficients did not move or collapsed, else ``None``.

    Args:
        recipe: The coefficients and the numbers of their sources.
        what: A source is called by this and its number.
    """
    rows = torch.tensor(recipe.coefficients)
    count = rows.shape[1]
    if count < 2:
        return None
    if (rows * count - 1).abs().max() <= 0.01:
        return (
            f"fusion did not move: all {count} coefficients are within 1 % of uniform; "
            "raise its lr or its steps"
        )
    if (rows.max(-1).values / rows.abs().sum(-1)).min() > 0.99:
        heaviest = int(rows.mean(0).argmax())
        return (
            f"fusion collapsed to the {what} {recipe.snapshots[heaviest]}; "
            f"check that no {what.split()[0]} was trained on the fuse pairs"
        )
    return None
