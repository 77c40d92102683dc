"""Pairs that were written before the run."""

from __future__ import annotations

from collections.abc import Sequence

from tpmm_pl.callbacks.round_context import RoundContext
from tpmm_pl.callbacks.round_pairs import RoundPairs
from tpmm_pl.types import InputError, OffersPairs, Pair


class OfflinePairs(RoundPairs):
    """Hands a shard of a data set to every round; the held-out split is scored once.

    The labels, and the noise in them, are the data's.
    """

    def training_pairs(self, context: RoundContext, round_index: int) -> Sequence[Pair]:
        """Return the shard of a coming round."""
        return _data(context).train_pairs(round_index)

    def held_out_pairs(self, context: RoundContext) -> Sequence[Pair]:
        """Return the fuse split after the start, nothing later."""
        return _data(context).fuse_pairs() if context.round_index == 0 else []


def _data(context: RoundContext) -> OffersPairs:
    if not isinstance(context.data, OffersPairs):
        raise InputError(
            f"OfflinePairs needs data with pairs, and {type(context.data).__name__} has none; "
            "use OnPolicyPairs for prompts"
        )
    return context.data
