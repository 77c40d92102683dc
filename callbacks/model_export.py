"""Hugging Face folders of what a run has made."""

from __future__ import annotations

from tpmm_pl.callbacks.round_end import RoundCallback, RoundContext, Stage
from tpmm_pl.models.export import export_model
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import Record
from tpmm_pl.types import Recipe


class ModelExport(RoundCallback):
    """Writes ``export/last``, ``export/merged`` and ``export/best`` after the last round.

    ``merged`` is what :class:`ReferenceMerge` chose to ship. ``best`` is the last round whose KL
    to the start is within the budget: a proxy alone would pick the most over-optimised round.
    A policy with adapters is exported as an adapter folder.

    Args:
        best_kl: The budget in nats a sequence; without a measured KL ``best`` is the last round.
    """

    def __init__(self, best_kl: float = 5.0) -> None:
        super().__init__()
        self.best_kl = best_kl

    def stages(self) -> dict[str, Stage]:
        """Return the stage that writes the folders."""
        return {"export": self.export}

    def export(self, context: RoundContext) -> None:
        """Write the folders."""
        index, store = context.round_index, context.store
        merged = store.record(index).ship.get("chosen") or store.record(index).recipe
        best = best_round(store.rounds, self.best_kl)
        wanted: dict[str, Recipe] = {"last": one_hot(index), "best": one_hot(best)}
        if merged is not None:
            wanted["merged"] = merged
        for name, recipe in wanted.items():
            context.load(recipe)
            out = store.root.parent / "export" / name
            export_model(context.policy, context.data.tokenizer, None, out)  # type: ignore[arg-type]


def best_round(records: list[Record], best_kl: float) -> int:
    """Return the last round whose KL to the start is at most ``best_kl`` nats a sequence."""
    name = "kl/policy_sft/in_domain"
    within = [r.round for r in records if r.metrics.get(name, 0.0) <= best_kl]
    return within[-1] if within else 0
