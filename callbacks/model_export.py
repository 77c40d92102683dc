"""Hugging Face folders of what a run has made."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.losses import PreferenceLoss
from tpmm_pl.models.card import CARD, policy_card
from tpmm_pl.models.export import export_model
from tpmm_pl.models.hub import check_repository, push_folder
from tpmm_pl.models.sharding import is_sharded
from tpmm_pl.models.stacking import is_mergeable
from tpmm_pl.models.weights import materialise_cut, whole_state
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import Record, TrajectoryStore
from tpmm_pl.types import InputError, Recipe

KL_TO_START = "kl/policy_sft/in_domain"
"""The metric that chooses the best round."""


class ModelExport(RoundCallback):
    """Writes ``export/last``, ``export/merged`` and ``export/best`` after the last round.

    ``merged`` is what :class:`ReferenceMerge` chose to ship. ``best`` is the last round whose KL
    to the start is within the budget: a proxy alone would pick the most over-optimised round.
    A policy with adapters is exported as an adapter folder. Every folder has the tokenizer,
    generation settings, ``recipe.json`` and a model card.

    Args:
        best_kl: The budget in nats a sequence; without a measured KL ``best`` is the last round.
        adapter_rank: Of ``merged`` where adapters are merged: ``exact`` (K adapters of rank r
            become one of rank K r), or the best approximation by the ``policy``'s own rank or by a
            number; its relative error is printed.
        push_to_hub: A repository's id; one folder is pushed there once all are on disk. What fails
            is a warning.
        push: Which folder.

    Raises:
        InputError: If a setting cannot be.
    """

    def __init__(
        self,
        best_kl: float = 5.0,
        adapter_rank: Literal["exact", "policy"] | int = "exact",
        push_to_hub: str | None = None,
        push: Literal["last", "merged", "best"] = "merged",
    ) -> None:
        super().__init__()
        if isinstance(adapter_rank, int) and adapter_rank < 1:
            raise InputError(f"export.adapter_rank is {adapter_rank}; it must be at least 1")
        if push_to_hub is not None:
            check_repository(push_to_hub)
        self.best_kl = best_kl
        self.adapter_rank = adapter_rank
        self.push_to_hub = push_to_hub
        self.push = push

    def stages(self) -> dict[str, Stage]:
        """Return the stage that writes the folders."""
        return {"export": self.export}

    def check_policy(self, policy: nn.Module) -> None:
        """Refuse a rank that the policy's merges cannot be cut to.

        Raises:
            InputError: If the policy has no adapter, or one that scales rows of full weights.
        """
        asked = f"export.adapter_rank is {self.adapter_rank}, but"
        if self.adapter_rank != "exact" and not isinstance(policy, PeftModel):
            raise InputError(f"{asked} the policy has no adapter; leave it out, or set lora")
        if isinstance(self.adapter_rank, int) and not is_mergeable(policy):
            raise InputError(
                f"{asked} the policy has use_dora, whose rank cannot be changed; leave it out"
            )

    def export(self, context: RoundContext) -> None:
        """Write the folders, then push one of them."""
        index, store = context.round_index, context.store
        merged = store.record(index).ship.get("chosen") or store.record(index).recipe
        best = best_round(store.rounds, self.best_kl)
        wanted: dict[str, Recipe] = {"last": one_hot(index), "best": one_hot(best)}
        if merged is not None:
            wanted["merged"] = merged
        for name, recipe in wanted.items():
            facts = training_facts(context)
            if name == "merged":
                facts |= self._load_merged(context, recipe)
            else:
                context.load(recipe)
            self._write(context, recipe, facts, _folder(store, name))
        *others, newest = sorted(wanted, key=("last", "merged", "best").index)
        if not processes.is_first():
            return
        print(f"export: {', '.join(others)} and {newest} in {_folder(store, '')}", flush=True)
        if self.push_to_hub is not None:
            self._push(context, self.push_to_hub, _folder(store, self.push))

    def _load_merged(self, context: RoundContext, recipe: Recipe) -> dict[str, Any]:
        """Put the merge into the module; return what is to be known of how."""
        policy, rank = context.policy, self.adapter_rank
        if not isinstance(policy, PeftModel) or not is_mergeable(policy) or rank == "exact":
            context.load(recipe)
            return {}
        error = materialise_cut(policy, context.store, recipe, None if rank == "policy" else rank)
        context.forget()
        cut = policy.peft_config[str(policy.active_adapter)].r  # type: ignore[attr-defined]
        if processes.is_first():
            print(f"export/merged: cut to rank {cut}, relative error {error:.1e}", flush=True)
        known = {"adapter rank": cut, "relative error of the rank": f"{error:.1e}"}
        return known | {"metrics measured": "before the cut to that rank"}

    def _write(
        self, context: RoundContext, recipe: Recipe, facts: dict[str, Any], out: Path
    ) -> None:
        store, policy = context.store, context.policy
        card = policy_card(
            store,
            recipe,
            adapter=isinstance(policy, PeftModel),
            training=facts,
            metrics=measured(store.record(context.round_index), recipe, store),
        )
        content = {**recipe.to_json(), "sha256": store.recipe_sha256(recipe)}
        notes = {CARD: card, "recipe.json": json.dumps(content, indent=1) + "\n"}
        spread = is_sharded(policy) and not isinstance(policy, PeftModel)
        state = whole_state(policy) if spread else None
        if processes.is_first():
            export_model(policy, context.data.tokenizer, state, out, notes)  # type: ignore[arg-type]

    def _push(self, context: RoundContext, repository: str, folder: Path) -> None:
        if not folder.is_dir():
            failure: str | None = f"there is no {folder} to push to {repository}"
        else:
            failure = push_folder(folder, repository)
        if failure is not None:
            warnings.warn(failure, stacklevel=2)
        context.store.update(
            context.round_index, notes={"push": failure or f"{folder.name} is at {repository}"}
        )


def training_facts(context: RoundContext) -> dict[str, Any]:
    """Return what a module of preference training says of itself, by name."""
    loss = getattr(context.receiver, "loss", None)
    return {
        "rounds": context.round_index,
        "epochs a round": getattr(context.receiver, "epochs_per_round", None),
        "loss": loss if isinstance(loss, PreferenceLoss) else None,
        "seed": context.seed,
    }


def measured(final: Record, recipe: Recipe, store: TrajectoryStore) -> dict[str, float]:
    """Return the metrics that were measured on what a recipe makes.

    Args:
        final: The last round's record.
        recipe: One snapshot's metrics are its round's; a merge's are the last round's of it.
        store: The trajectory.
    """
    if len(recipe.snapshots) == 1:
        metrics = store.record(recipe.snapshots[0]).metrics
        return {n: v for n, v in metrics.items() if not n.startswith(("merge/", "ship/"))}
    shipped = [name for name, r in final.ship.items() if r == recipe and name != "chosen"]
    prefixes = ["merge/"] if final.recipe == recipe else []
    prefixes += [f"ship/{name}/" for name in shipped]
    return {
        name.removeprefix(prefix): value
        for prefix in prefixes
        for name, value in final.metrics.items()
        if name.startswith(prefix)
    }


def best_round(records: list[Record], best_kl: float) -> int:
    """Return the last round whose KL to the start is at most ``best_kl`` nats a sequence."""
    within = [r.round for r in records if r.metrics.get(KL_TO_START, 0.0) <= best_kl]
    return within[-1] if within else 0


def _folder(store: TrajectoryStore, name: str) -> Path:
    return store.root.parent / "export" / name
