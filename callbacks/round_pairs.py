"""Pairs of a round, scored once under its reference."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from math import nan

import numpy as np
import torch

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.data.notices import say
from tpmm_pl.data.pairs import read_fuse_pool, refuse_fuse_prompts, write_pairs
from tpmm_pl.data.table import PairTable, as_table, join, with_reference
from tpmm_pl.models.reference_cache import cached_logps
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import CONTROL
from tpmm_pl.types import Pair, PairLogps, Recipe, RunError


class RoundPairs(RoundCallback):
    """Writes the next round's pairs with their reference log-probabilities, and fuse pairs.

    Where the module says ``needs_reference = False``, as losses without a reference do, the
    round's pairs are not scored; fuse pairs are, since a learned merge is measured against the
    start whatever the loss is. Reference log-probabilities that come with all pairs are used where
    they are those of the reference: data from files has the starting policy's, completions that
    the reference itself has sampled have its own. Others are computed, once for the same weights
    and tokens: they are kept beside the run's folder (``.reference``).

    Args:
        train_on_fuse_pairs: Add all held-out pairs so far to every round's training pairs. This
            is the control that gives a baseline the same information; with the strategy
            ``learned`` it leaks, and is refused.
    """

    from_data = True
    """Whether pairs are read, and not sampled by the policy."""

    def __init__(self, train_on_fuse_pairs: bool = False) -> None:
        super().__init__()
        self.train_on_fuse_pairs = train_on_fuse_pairs

    @abstractmethod
    def training_pairs(self, context: RoundContext, round_index: int) -> Sequence[Pair]:
        """Return the pairs of a coming round; the module holds the policy that starts it."""

    @abstractmethod
    def held_out_pairs(self, context: RoundContext) -> Sequence[Pair]:
        """Return new fuse pairs made after a round; the module holds that round's policy."""

    def scored_under(self, context: RoundContext) -> Recipe | None:
        """Return the merge that log-probabilities which come with pairs are of: the start."""
        return one_hot(0)

    def stages(self) -> dict[str, Stage]:
        """Return the stages that write fuse pairs and training pairs."""
        return {"fuse_pairs": self.write_fuse_pairs, "pairs": self.write_training_pairs}

    def write_fuse_pairs(self, context: RoundContext) -> None:
        """Write this round's held-out pairs, scored under the starting policy."""
        context.load_policy()
        if self.train_on_fuse_pairs:
            context.store.update(0, notes={CONTROL: "fuse pairs are trained on"})
        pairs = as_table(self.held_out_pairs(context))
        if pairs:
            scored = self._scored(context, pairs, one_hot(0), "fuse pairs")
            _write(context, "fuse", scored)

    def write_training_pairs(self, context: RoundContext) -> None:
        """Write the next round's pairs, scored under its reference if the loss needs one.

        Raises:
            InputError: If one of their prompts is held out for learning coefficients.
            RunError: If there is no pair.
        """
        index = context.round_index
        context.put_back()
        pairs = as_table(self.training_pairs(context, index + 1))
        if self.train_on_fuse_pairs:
            # two references' log-probabilities do not mix
            pairs = unscored(join(pairs, read_fuse_pool(context.store, index)))
        else:
            refuse_fuse_prompts(pairs, context.store, index)
        if not pairs:
            raise RunError(
                f"round {index + 1} has no pairs: every candidate was a tie or a repetition; raise "
                "samples or temperature and resume with --ckpt_path last"
            )
        size = getattr(context.data, "batch_size", 1)
        if len(pairs) < size:
            warnings.warn(
                f"round {index + 1} trains on {len(pairs)} pairs, fewer than a batch of {size}",
                stacklevel=2,
            )
        if getattr(context.receiver, "needs_reference", True):
            recipe = context.store.record(index).recipe or one_hot(0)
            pairs = self._scored(context, pairs, recipe, f"pairs of round {index + 1}")
        elif not self.from_data:
            pairs = unscored(pairs)  # under the sampler, which is no reference
        _write(context, "pairs", pairs)
        flipped = float(pairs.column("flipped").mean())
        context.log({"pairs/count": len(pairs), "pairs/flipped": flipped})

    def _scored(
        self, context: RoundContext, pairs: PairTable, recipe: Recipe, title: str
    ) -> PairTable:
        known = self.scored_under(context)
        if known is not None and known.merges_as(recipe) and _come_scored(pairs):
            if self.from_data:
                say(f"{title}: the log-probabilities of the starting policy come with the data")
            return pairs
        context.load(recipe)
        with context.passes():
            logps = cached_logps(
                context.policy, pairs, context.reference_cache, token_budget=context.token_budget
            )
        return with_reference(pairs, logps)


def unscored(pairs: Sequence[Pair]) -> PairTable:
    """Return pairs without the log-probabilities that come with them."""
    unknown = torch.full((len(pairs),), nan)
    return with_reference(pairs, PairLogps(unknown, unknown))


def _write(context: RoundContext, name: str, pairs: PairTable) -> None:
    """Write pairs from the first process; enter them in the record under ``name``."""
    store, index = context.store, context.round_index
    path = store.folder(index) / f"{name}.parquet"
    digest = processes.from_first(lambda: write_pairs(path, pairs))
    store.update(index, **{name: store.relative(path), f"{name}_sha256": digest})


def _come_scored(pairs: PairTable) -> bool:
    columns = (pairs.column(name) for name in ("ref_chosen_logps", "ref_rejected_logps"))
    return all(bool(np.isfinite(column).all()) for column in columns)
