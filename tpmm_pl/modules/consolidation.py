"""Learning how the experts of a reward model become one dense layer again (UMM-RM)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.source import PolicySource
from tpmm_pl.modules.fusion import FusionSettings, FusionWeights, fit_warning
from tpmm_pl.modules.pair_validation import PairValidation
from tpmm_pl.moe.convert import (
    consolidate,
    expert_groups,
    expert_sources,
    mixture_layers,
    shared_coefficients,
)
from tpmm_pl.moe.routing import recorded_routing
from tpmm_pl.streaming import StreamedMerge
from tpmm_pl.types import InputError, PairBatch, Recipe, Rewards

Start = Literal["uniform", "routing"]


def ranking(rewards: Rewards, batch: PairBatch, beta: float) -> Tensor:
    """Bradley-Terry loss of the dense model's rewards, ``(B,)`` nats, as in training."""
    return bradley_terry_loss(rewards.chosen, rewards.rejected, margin=batch.margin)


class ExpertFusion(PairValidation, FusionWeights):
    r"""Coefficients of every layer's experts, learned on held-out pairs.

    .. math:: W = \lambda W_{shared} + (1 - \lambda) \sum_i \mathrm{softmax}(a)_i W_i

    Only :math:`a` trains, one row a layer; :math:`\lambda` is fixed and the router is dropped.
    ``reward`` is the dense model from the moment the experts are bound.

    Args:
        reward: Makes the mixture of experts, for a fit of its own in a Trainer.
        shared_coefficient: :math:`\lambda` in [0, 1], split evenly over several shared experts.
        start: The plain average of the routed experts, or their mean gates on the fit's pairs.
        lr: Of Adam on :math:`a`.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        reward: PolicySource | None = None,
        shared_coefficient: float = 0.5,
        start: Start = "uniform",
        lr: float = 0.1,
    ) -> None:
        if not 0 <= shared_coefficient <= 1:
            raise InputError(f"shared_coefficient is {shared_coefficient}; it must be in [0, 1]")
        super().__init__(FusionSettings(grouping="layer", lr=lr))
        self.objective = ranking
        self.reward_source = reward
        self.shared_coefficient = shared_coefficient
        self.start = start
        self.reward: nn.Module

    def bind_experts(self, model: nn.Module, gates: Tensor | None = None) -> ExpertFusion:
        """Turn a mixture of experts into the dense model whose merge is learned.

        Args:
            model: Becomes dense in place; its experts are kept as sources.
            gates: Mean gates of the routed experts to start from, ``(L, normal)``; ``None``: the
                plain average.

        Returns:
            Itself, with fresh coefficients.

        Raises:
            InputError: If the model has no experts.
        """
        found = mixture_layers(model)
        layers, settings = tuple(found), next(iter(found.values())).settings
        sources, group_of = expert_sources(model), expert_groups(model)
        self.constraint = partial(
            _shared_softmax, shared=settings.shared, shared_coefficient=self.shared_coefficient
        )
        start = torch.zeros(len(layers), settings.normal)
        if gates is not None:
            # an expert that no token was sent to starts low, not at minus infinity
            start = (gates / gates.sum(-1, keepdim=True)).clamp(min=1e-6).log().float()
        consolidate(model, self.constraint(start))
        # only experts are merged: the backward pass must leave no gradient elsewhere
        model.requires_grad_(False)
        parameters = {name: p for name, p in model.named_parameters() if name in group_of}
        merge = StreamedMerge(parameters, sources, group_of, len(layers))
        self.attach(merge, layers, RewardScorer(model), tuple(range(settings.experts)), start)
        self.shared = settings.shared
        self.__dict__["reward"] = model  # not a submodule: only the coefficients are saved
        return self

    def configure_model(self) -> None:
        """Load the mixture of experts of a fit of its own."""
        if hasattr(self, "weights"):
            return
        if self.reward_source is None:
            raise InputError("ExpertFusion needs `reward`, the mixture of experts to consolidate")
        model: nn.Module = self.reward_source.load_model()
        model.to(self.trainer.strategy.root_device)
        gates = None
        if self.start == "routing":
            steps: Iterable[list[PairBatch]] = self.trainer.datamodule.train_dataloader()
            gates = mean_gates(model, chain.from_iterable(steps))
        self.bind_experts(model.eval(), gates)

    def on_validation_start(self) -> None:
        """Measure the merge as it is after the last step."""
        self.merge.write(self.coefficients())
        super().on_validation_start()

    def on_train_epoch_end(self) -> None:
        """Put the learned merge into the dense model."""
        self.merge.write(self.coefficients())

    def warning(self) -> str | None:
        """Return a sentence if the routed experts' coefficients did not move or collapsed."""
        rows = self.weights.detach().double().softmax(-1)
        experts = self.snapshots[self.shared :]
        coefficients = tuple(tuple(row) for row in rows.tolist())
        recipe = Recipe("learned", experts, coefficients, "layer", self.groups)
        return fit_warning(recipe, what="expert")


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[PairBatch]) -> Tensor:
    """Return the mean gate of every routed expert over the tokens of pairs.

    Args:
        model: A mixture of experts; scored in evaluation mode, its own mode is put back.
        batches: The pairs.

    Returns:
        ``(L, normal)`` float64, a row a layer.

    Raises:
        InputError: If the model has no experts.
    """
    settings = next(iter(mixture_layers(model).values())).settings
    scorer, training = RewardScorer(model), model.training
    device = next(model.parameters()).device
    model.eval()
    total: Tensor | None = None
    for batch in batches:
        tree = batch.tree.to(device)
        seen = scorer.seen(tree)
        with recorded_routing(model, seen) as routings:
            scorer.rows(tree)
        gates = torch.stack([r.weight[settings.shared :].double() for r in routings.values()])
        total = int(seen.sum()) * gates + (0 if total is None else total)
    model.train(training)
    if total is None:
        raise InputError("there are no pairs to measure the gates on; give more")
    return (total / total.sum(-1, keepdim=True)).cpu()


def _shared_softmax(weights: Tensor, *, shared: int, shared_coefficient: float) -> Tensor:
    return shared_coefficients(weights.softmax(-1), shared, shared_coefficient)
