"""The reference of the next round: a merge of the trajectory, learned or by rule."""

from __future__ import annotations

import json
import warnings
from math import isfinite
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback, reset_optimizer
from tpmm_pl.data.batching import fuse_loader
from tpmm_pl.data.pairs import read_fuse_pool
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.models.sharding import is_sharded
from tpmm_pl.models.stacking import check_mergeable, is_mergeable
from tpmm_pl.modules.fusion import FusionSettings, FusionWeights, fit_warning
from tpmm_pl.rollouts import sample_shared
from tpmm_pl.rounds import check_strategy, entropy, fixed_recipe, one_hot
from tpmm_pl.types import InputError, OffersPrompts, Recipe

GUARD_PROMPTS = 64
"""At most so many prompts are answered to measure the divergence of a learned merge."""

_CURVES = {"fuse": "fusion.json", "ship": "ship.json"}


class ReferenceMerge(RoundCallback):
    """Makes the reference after every round and sets the policy that trains next.

    Args:
        strategy: ``last`` (iterative DPO), ``initial`` (a fixed reference), ``uniform``,
            ``window``, ``ema`` or ``learned`` (TPMM-DPO).
        next_policy: Whether the next round starts from the ``last`` policy or from the ``merge``;
            by default from the merge for uniform, ema and learned, from the last otherwise.
        window: Snapshots that ``window`` averages.
        alpha: Weight of the newest policy in ``ema``.
        fusion: How ``learned`` learns.
        guard_kl: Largest KL of a learned merge to the start, in nats a sequence, measured where
            prompts are at hand; above it the round falls back to uniform. ``None``: no guard.
        guard_weight: Largest mean coefficient of the newest snapshot of a learned merge of three
            or more; above it the round falls back to uniform. ``None``: no guard.
        ship: What is exported as merged: the last ``merge``, the plain ``average`` of the
            trajectory, or a ``learned`` fit of its own at the end.
        ship_steps: Steps of that fit; 0 leaves it out.
    """

    def __init__(
        self,
        strategy: str = "learned",
        next_policy: Literal["last", "merge"] | None = None,
        window: int = 3,
        alpha: float = 0.6,
        fusion: FusionSettings | None = None,
        guard_kl: float | None = 5.0,
        guard_weight: float | None = 0.9,
        ship: Literal["merge", "average", "learned"] = "merge",
        ship_steps: int = 40,
    ) -> None:
        super().__init__()
        check_strategy(strategy)
        if ship == "learned" and not ship_steps:
            raise InputError("ship: learned needs ship_steps above 0")
        by_default = "merge" if strategy in ("uniform", "ema", "learned") else "last"
        self.strategy = strategy
        self.next_policy = next_policy or by_default
        self.window = window
        self.alpha = alpha
        self.fusion = fusion or FusionSettings()
        self.guard_kl = guard_kl
        self.guard_weight = guard_weight
        self.ship = ship
        self.ship_steps = ship_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that would write over the next policy, before any round.

        Raises:
            InputError: Naming the way out.
        """
        if self.next_policy == "merge" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise InputError(
                "DeepSpeed trains weights of its own, which would write over a merge; set"
                " reference.next_policy to last, or use configs/overlays/fsdp2.yaml"
            )

    def stages(self) -> dict[str, Stage]:
        """Return the stages that make the reference, set the next policy and prepare shipping."""
        return {
            "fuse": self.make_reference,
            "ship": self.make_ship_recipes,
            "next_policy": self.set_next_policy,
        }

    def check_policy(self, policy: nn.Module) -> None:
        """Refuse adapters of which several have no merge, where several are to be merged.

        Raises:
            InputError: Naming the settings that go with them.
        """
        if self.strategy not in ("last", "initial") or self.ship != "merge":
            check_mergeable(policy)

    def make_reference(self, context: RoundContext) -> None:
        """Write the recipe of the next round's reference."""
        index = context.round_index
        if "learned" in (self.strategy, self.ship):
            _check_held_out(context)
        if self.strategy == "learned":
            recipe = self._learned(context)
        else:
            previous = context.store.record(index - 1).recipe if index else None
            recipe = fixed_recipe(
                self.strategy, index, window=self.window, alpha=self.alpha, previous=previous
            )
        content = {**recipe.to_json(), "sha256": context.store.recipe_sha256(recipe)}
        context.write(context.store.folder(index) / "recipe.json", json.dumps(content, indent=1))
        context.store.update(index, recipe=recipe)
        weights = zip(recipe.snapshots, recipe.coefficients[0], strict=True)
        named = {f"fusion/weight_{k:02d}": c for k, c in weights} if len(recipe.groups) == 1 else {}
        context.log({**named, "fusion/entropy": entropy(recipe)})

    def learn(self, context: RoundContext, steps: int, stage: str) -> Recipe:
        """Learn coefficients over the snapshots that are kept, on all held-out pairs so far.

        Args:
            context: The round; its module is left holding some merge.
            steps: At most so many.
            stage: ``fuse`` or ``ship``: names the order of the pairs and the file of the curve.

        Raises:
            InputError: If there are no held-out pairs.
        """
        store, index = context.store, context.round_index
        module = FusionWeights(self.fusion)
        module.bind(context.policy, store, store.kept(index))
        fit_with_fabric(
            context.fabric,
            module,
            fuse_loader(
                read_fuse_pool(store, index),
                batch_size=self.fusion.batch_size,
                steps=steps,
                token_budget=context.token_budget,
                generator=context.generator(stage),
            ),
            title=f"round {index}: learning coefficients",
        )
        context.forget()
        recipe = module.recipe()
        curve = {"loss": module.losses, "entropy": entropy(recipe), "steps": len(module.losses)}
        context.write(store.folder(index) / _CURVES[stage], json.dumps(curve, indent=1))
        if (sentence := fit_warning(recipe)) is not None:
            warnings.warn(f"round {index}: {sentence}", stacklevel=2)
            store.update(index, notes={stage: sentence.split(":")[0]})
        return recipe

    def set_next_policy(self, context: RoundContext) -> None:
        """Put the next policy into the module and start its optimizer afresh."""
        last = one_hot(context.round_index)
        merge = context.store.record(context.round_index).recipe or last
        error = context.set_next_policy(merge if self.next_policy == "merge" else last)
        if error:
            context.log({"fusion/rank_error": error})
            note = f"cut to the adapter's rank, relative error {error:.1e}"
            context.store.update(context.round_index, notes={"rank": note})
        for optimizer in context.optimizers:
            reset_optimizer(optimizer, in_place=is_sharded(context.policy))

    def make_ship_recipes(self, context: RoundContext) -> None:
        """Write the recipes that may be shipped: the last merge, the average, a learned fit."""
        index = context.round_index
        record = context.store.record(index)
        recipes = {"merge": record.recipe or one_hot(index)}
        mergeable = is_mergeable(context.policy)
        whole = len(context.store.kept(index)) == index + 1
        if mergeable and (whole or self.ship == "average"):
            recipes["average"] = fixed_recipe("uniform", index)
        held_out = mergeable and any(r.fuse for r in context.store.rounds)
        if held_out and self.ship_steps and not context.store.trained_on_fuse_pairs:
            recipes["learned"] = self.learn(context, self.ship_steps, "ship")
        context.store.update(index, ship={**recipes, "chosen": recipes[self.ship]})

    def _learned(self, context: RoundContext) -> Recipe:
        if context.round_index == 0:
            return one_hot(0, "learned")
        return self._guarded(context, self.learn(context, self.fusion.steps, "fuse"))

    def _guarded(self, context: RoundContext, recipe: Recipe) -> Recipe:
        alarm = self._alarm(context, recipe)
        if alarm is None:
            return recipe
        warnings.warn(
            f"round {context.round_index}: {alarm}; the reference is the plain average instead",
            stacklevel=2,
        )
        context.store.update(context.round_index, notes={"guard": f"guard: {alarm}"})
        kept = context.store.kept(context.round_index)
        return Recipe("uniform", kept, ((1 / len(kept),) * len(kept),))

    def _alarm(self, context: RoundContext, recipe: Recipe) -> str | None:
        newest = float(torch.tensor(recipe.coefficients)[:, -1].mean())
        many = len(recipe.snapshots) > 2
        if not isfinite(newest):
            return "learned coefficients are not finite"
        if self.guard_weight is not None and many and newest > self.guard_weight:
            return f"learned weight {newest:.2f} on the newest policy"
        if self.guard_kl is None or not isinstance(context.data, OffersPrompts):
            return None
        kl = start_divergence(context, recipe)
        context.log({"fusion/kl_merge_sft": kl})
        # written so that a divergence that is not a number raises the alarm too
        return None if kl <= self.guard_kl else f"learned merge at KL {kl:.1f}"


def start_divergence(context: RoundContext, recipe: Recipe) -> float:
    """Estimate KL(merge || starting policy) in nats a sequence on the round's held-out prompts."""
    tokenizer = context.data.tokenizer
    prompts = context.data.fuse_prompts(context.round_index)[:GUARD_PROMPTS]
    pool = read_fuse_pool(context.store, context.round_index)
    budget = max(len(pair.chosen_ids) for pair in pool)
    context.load(recipe)
    with context.passes():
        completions = sample_shared(
            context.policy, tokenizer, prompts, samples=1, max_new_tokens=budget,
            key=context.key("guard"),
        )  # fmt: skip
    start = context.scores(completions, one_hot(0))
    return float(torch.tensor([c.logps for c in completions]).sub(start).mean())


def _check_held_out(context: RoundContext) -> None:
    # before the first round: a mistake must not come to light after a round of training
    if context.store.trained_on_fuse_pairs:
        raise InputError(
            "learned coefficients need held-out pairs, but train_on_fuse_pairs adds them to "
            "training; choose another strategy for this control arm"
        )
    read_fuse_pool(context.store, context.round_index)
