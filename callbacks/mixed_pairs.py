"""Pairs of a round from two sources: the policy's own completions and a data set."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tpmm_pl.callbacks.offline_pairs import OfflinePairs
from tpmm_pl.callbacks.on_policy_pairs import OnPolicyPairs
from tpmm_pl.callbacks.round_context import RoundContext
from tpmm_pl.callbacks.round_pairs import RoundPairs, unscored
from tpmm_pl.data.table import PairTable, as_table, join
from tpmm_pl.rollouts.shards import Shard
from tpmm_pl.types import InputError, OffersPairs, OffersPrompts


class MixedPairs(RoundPairs):
    """Trains every round on pairs of the policy's own completions and pairs of a data set.

    The ratio holds in every round. No more prompts are answered than the round's offline pairs
    can be mixed with, one pair a prompt; where one kind is short, a part of the other is drawn,
    and a warning says how many are left out. Only a round that has none of a kind trains on the
    other alone, and says so. Fuse pairs are those of both.

    Args:
        on_policy: Makes the on-policy pairs, with its own annotator, method and noise.
        offline: Hands out the offline pairs; their noise is the data's.
        ratio: Share of on-policy pairs, in ``(0, 1)``.
        train_on_fuse_pairs: See :class:`RoundPairs`.

    Raises:
        InputError: If ``ratio`` is out of range, or a part is to train on fuse pairs by itself.
    """

    def __init__(
        self,
        on_policy: OnPolicyPairs,
        offline: OfflinePairs,
        ratio: float = 0.5,
        train_on_fuse_pairs: bool = False,
    ) -> None:
        super().__init__(train_on_fuse_pairs)
        if not 0 < ratio < 1:
            raise InputError(
                f"ratio is {ratio}; the share of on-policy pairs lies between 0 and 1: use "
                "OfflinePairs for 0 and OnPolicyPairs for 1"
            )
        if on_policy.train_on_fuse_pairs or offline.train_on_fuse_pairs:
            raise InputError("train_on_fuse_pairs is set on a part; set it on MixedPairs itself")
        self.on_policy = on_policy
        self.offline = offline
        self.ratio = ratio

    def training_pairs(self, context: RoundContext, round_index: int) -> PairTable:
        """Make both kinds of a coming round and mix them."""
        _check_data(context)
        offline, usable = self._offline_pairs(context, round_index)
        on_policy = as_table(self.on_policy.training_pairs(context, round_index, usable))
        used = mixed_counts(len(on_policy), len(offline), self.ratio)
        if (sentence := self._warning((len(on_policy), len(offline)), used)) is not None:
            warnings.warn(f"round {round_index}: {sentence}", stacklevel=2)
        generator = context.generator("mix")
        # two references' log-probabilities do not mix
        sampled = unscored(_drawn(on_policy, used[0], generator))
        pairs = join(sampled, _drawn(offline, used[1], generator))
        if pairs:
            context.log({"pairs/on_policy": used[0] / len(pairs)})
        return pairs

    def held_out_pairs(self, context: RoundContext) -> PairTable:
        """Return the new fuse pairs of both kinds."""
        _check_data(context)
        on_policy = unscored(self.on_policy.held_out_pairs(context))
        return join(on_policy, self.offline.held_out_pairs(context))

    def make_shard(self, context: RoundContext, round_index: int, shard: Shard) -> Path:
        """Write a part of the on-policy completions; see :meth:`OnPolicyPairs.make_shard`."""
        _check_data(context)
        _, usable = self._offline_pairs(context, round_index)
        return self.on_policy.make_shard(context, round_index, shard, usable)

    def _offline_pairs(
        self, context: RoundContext, round_index: int
    ) -> tuple[PairTable, int | None]:
        """Return a round's offline pairs and how many prompts are worth answering beside them."""
        offline = as_table(self.offline.training_pairs(context, round_index))
        return offline, max(1, _partners(len(offline), self.ratio)) if offline else None

    def _warning(self, there: tuple[int, int], used: tuple[int, int]) -> str | None:
        names = ("on-policy", "offline")
        for short, other in ((0, 1), (1, 0)):
            if there[other] and not there[short]:
                return (
                    f"there are no {names[short]} pairs, so all {there[other]} pairs are "
                    f"{names[other]}, not a mix at ratio {self.ratio:g}"
                )
            if used[other] < there[other]:
                return (
                    f"{there[short]} {names[short]} pairs are too few for {there[other]} "
                    f"{names[other]} ones at ratio {self.ratio:g}; "
                    f"{there[other] - used[other]} {names[other]} pairs are left out"
                )
        return None


def mixed_counts(on_policy: int, offline: int, ratio: float) -> tuple[int, int]:
    """Return how many pairs of each kind make the largest mix at a ratio.

    One kind is used whole; the share of on-policy pairs is ``ratio`` up to rounding.

    Args:
        on_policy: How many there are.
        offline: How many there are.
        ratio: Share of on-policy pairs, in ``(0, 1)``.
    """
    if not on_policy or not offline:
        return on_policy, offline
    partners = max(1, _partners(on_policy, 1 - ratio))
    if partners <= offline:
        return on_policy, partners
    return min(on_policy, max(1, _partners(offline, ratio))), offline


def _partners(count: int, ratio: float) -> int:
    return round(count * ratio / (1 - ratio))


def _drawn(pairs: PairTable, count: int, generator: torch.Generator) -> PairTable:
    places = torch.randperm(len(pairs), generator=generator)[:count]
    return pairs.select(places.sort().values.numpy())


def _check_data(context: RoundContext) -> None:
    name = type(context.data).__name__
    for kind, protocol, instead in (
        ("prompts", OffersPrompts, "OfflinePairs"),
        ("pairs", OffersPairs, "OnPolicyPairs"),
    ):
        if not isinstance(context.data, protocol):
            raise InputError(
                f"MixedPairs needs data with prompts and pairs, and {name} has no {kind}; use "
                f"{instead}, or data that has both"
            )
