"""How much a fit has to do: rounds, steps, and the tokens of every kind of pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from tpmm_pl.callbacks.mixed_pairs import MixedPairs, mixed_counts
from tpmm_pl.callbacks.offline_pairs import OfflinePairs
from tpmm_pl.callbacks.on_policy_pairs import OnPolicyPairs
from tpmm_pl.callbacks.reference_merge import GUARD_PROMPTS, ReferenceMerge
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.callbacks.round_evaluation import RoundEvaluation
from tpmm_pl.callbacks.round_pairs import RoundPairs
from tpmm_pl.callbacks.trajectory_snapshot import TrajectorySnapshot
from tpmm_pl.data.pairs import read_fuse_pool
from tpmm_pl.data.table import PairTable, as_table
from tpmm_pl.modules.fusion import FusionWeights
from tpmm_pl.pairing import METHODS
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair, Prompt


@dataclass(frozen=True)
class Amount:
    """So many pairs or completions, and the tokens of them all, a pair's prompt once."""

    count: int = 0
    tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        """Add up both counts."""
        return Amount(self.count + other.count, self.tokens + other.tokens)

    def times(self, factor: float) -> Amount:
        """Return a multiple, rounded."""
        return Amount(round(self.count * factor), round(self.tokens * factor))


_NONE = Amount()


@dataclass(frozen=True)
class Workload:
    """What a whole fit has to do."""

    rounds: int
    """That are trained; 1 of a fit without rounds."""
    epochs: int
    """Passes over a round's pairs."""
    pairs: Amount
    """Of a round."""
    steps: int
    """Optimizer steps of a round."""
    pairs_a_step: int
    """Of all devices."""
    sampled_pairs: bool = False
    """Whether the pairs are made of completions: there are at most so many."""
    fuse: Amount = _NONE
    """Held-out pairs at the end of the run."""
    scored: Amount = _NONE
    """Pairs passed without gradients: under references, and held-out ones."""
    sampled: Amount = _NONE
    """Completions, each of the whole budget of tokens."""
    fusion: Amount = _NONE
    """Pairs that coefficients are learned on, once for every step that sees them."""
    snapshots: int = 0
    """Of a trajectory that are on disk when the run ends, at most."""
    at_once: tuple[int, int] = (0, 0)
    """Completions sampled at once, and the most tokens of one with its prompt."""


def plain_workload(trainer: Trainer, module: Any, data: Any, callbacks: Sequence[Any]) -> Workload:
    """Return what a fit of a data module of pairs has to do: of a reward model, or of experts.

    Args:
        trainer: Says for how many epochs.
        module: Of the fit.
        data: Set up.
        callbacks: None of them adds work that is counted.
    """
    epochs = max(1, trainer.max_epochs or 1)
    if hasattr(data, "train_pairs"):
        pairs, at_once = amount(data.train_pairs), data.batch_size * devices(trainer)
        steps = epochs * _steps(pairs.count, at_once)
    else:
        # held-out pairs of another run, drawn as often as the module says
        pairs, at_once = amount(pairs_of_run(module)), module.settings.batch_size
        steps = epochs * len(data.train_dataloader())
    steps = min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
    return Workload(1, epochs, pairs, steps, pairs_a_step=min(at_once, pairs.count))


def round_workload(trainer: Trainer, module: Any, data: Any, callbacks: Sequence[Any]) -> Workload:
    """Return what a fit in rounds has to do; the first round stands for all.

    Args:
        trainer: Its number of processes shares the batches.
        module: With ``rounds`` and ``epochs_per_round``.
        data: Set up.
        callbacks: Of the trainer.
    """
    given = max((c.given_rounds for c in callbacks if isinstance(c, RoundCallback)), default=0)
    rounds = module.rounds - given
    maker = next((c for c in callbacks if isinstance(c, RoundPairs)), None)
    merge = next((c for c in callbacks if isinstance(c, ReferenceMerge)), None)
    judge = next((c for c in callbacks if isinstance(c, RoundEvaluation)), None)
    sampler = sampler_of(callbacks)
    at_once = data.batch_size * devices(trainer)
    pairs = Amount() if maker is None else training_pairs(maker, data)
    fuse = Amount() if maker is None else _fuse_pairs(maker, data, rounds)
    if maker is not None and maker.train_on_fuse_pairs:
        pairs = pairs + fuse.times(0.5 if sampler else 1)  # they come round by round
    held_out = _together(amount(part) for part in data.eval_pairs().values())
    merges = 1 if merge is None else 2
    scored = fuse + held_out.times(1 + merges * rounds)
    if getattr(module, "needs_reference", True):
        scored = scored + pairs.times(rounds)
    return Workload(
        rounds=rounds,
        epochs=module.epochs_per_round,
        pairs=pairs,
        steps=module.epochs_per_round * _steps(pairs.count, at_once),
        pairs_a_step=min(at_once, pairs.count),
        sampled_pairs=sampler is not None,
        fuse=fuse,
        scored=scored,
        sampled=_completions(sampler, merge, judge, data, rounds),
        fusion=_fused(merge, fuse, rounds),
        snapshots=_snapshots(module.rounds, callbacks),
        at_once=_at_once(sampler, judge, data),
    )


def pairs_of_run(module: FusionWeights) -> PairTable:
    """Return the held-out pairs of the finished run that coefficients are learned over.

    Raises:
        InputError: If there is no such run, or it has no pairs.
    """
    store = None if module.run is None else TrajectoryStore(module.run / "trajectory")
    if store is None or not store.rounds:
        raise InputError(f"model.run is {module.run}; give the folder of a finished run")
    return read_fuse_pool(store, store.rounds[-1].round)


def amount(pairs: Sequence[Pair]) -> Amount:
    """Return how many pairs there are and their tokens, a prompt once a pair."""
    return Amount(len(pairs), int(sum(part.sum() for part in as_table(pairs).lengths().values())))


def training_pairs(maker: Callback, data: Any) -> Amount:
    """Return the pairs of the first round: those read, or at most so many as are sampled."""
    if isinstance(maker, MixedPairs):
        offline = training_pairs(maker.offline, data)
        sampled = training_pairs(maker.on_policy, data)
        used = mixed_counts(sampled.count, offline.count, maker.ratio)
        parts = zip((sampled, offline), used, strict=True)
        return _together(part.times(count / max(1, part.count)) for part, count in parts)
    if isinstance(maker, OnPolicyPairs):
        return _sampled_pairs(maker, data.train_prompts(1), maker.samples)
    return amount(data.train_pairs(1)) if isinstance(maker, OfflinePairs) else Amount()


def _fuse_pairs(maker: Callback, data: Any, rounds: int) -> Amount:
    if isinstance(maker, MixedPairs):
        return _together(
            _fuse_pairs(part, data, rounds) for part in (maker.on_policy, maker.offline)
        )
    if isinstance(maker, OnPolicyPairs):
        first, later = (
            _sampled_pairs(maker, data.fuse_prompts(k), maker.fuse_samples) for k in (0, 1)
        )
        return first + later.times(rounds)
    return amount(data.fuse_pairs()) if isinstance(maker, OfflinePairs) else Amount()


def _sampled_pairs(maker: OnPolicyPairs, prompts: Sequence[Prompt], samples: int) -> Amount:
    group: Any = [(None, float(score)) for score in range(samples)]
    each = len(METHODS[maker.method](group, torch.Generator()))
    count = each * len(prompts)
    asked = sum(len(prompt.ids) for prompt in prompts)
    return Amount(count, each * asked + 2 * count * maker.max_new_tokens)


def _completions(
    sampler: OnPolicyPairs | None,
    merge: ReferenceMerge | None,
    judge: RoundEvaluation | None,
    data: Any,
    rounds: int,
) -> Amount:
    total = Amount()
    if sampler is not None:
        fuse = len(data.fuse_prompts(0)) + rounds * len(data.fuse_prompts(1))
        count = rounds * len(data.train_prompts(1)) * sampler.samples + fuse * sampler.fuse_samples
        total += Amount(count, count * sampler.max_new_tokens)
    if judge is not None:
        # policy and merge after every round; sampled and greedy of what may be shipped
        times = 1 + (1 if merge is None else 2) * rounds + (0 if merge is None else 2 * 4)
        count = times * sum(map(len, data.eval_prompts().values()))
        total += Amount(count, count * judge.max_new_tokens)
    if merge is not None and merge.strategy == "learned" and merge.guard_kl is not None:
        budget = _longest_answer(data) if sampler is None else sampler.max_new_tokens
        count = rounds * min(GUARD_PROMPTS, len(data.fuse_prompts(1)))
        total += Amount(count, count * budget)
    return total


def _fused(merge: ReferenceMerge | None, fuse: Amount, rounds: int) -> Amount:
    if merge is None or not fuse.count:
        return Amount()
    steps = merge.ship_steps + (rounds * merge.fusion.steps if merge.strategy == "learned" else 0)
    return fuse.times(steps * min(merge.fusion.batch_size, fuse.count) / fuse.count)


def _snapshots(rounds: int, callbacks: Sequence[Any]) -> int:
    kept = [c.keep_last for c in callbacks if isinstance(c, TrajectorySnapshot) and c.keep_last]
    # the start and the best round stay beside the newest, and after the last round what it dropped
    return min([rounds + 1, *(newest + 3 for newest in kept)])


def sampler_of(callbacks: Sequence[Any]) -> OnPolicyPairs | None:
    """Return what makes pairs of the policy's own completions, if any does."""
    parts = [c.on_policy if isinstance(c, MixedPairs) else c for c in callbacks]
    return next((part for part in parts if isinstance(part, OnPolicyPairs)), None)


def _at_once(
    sampler: OnPolicyPairs | None, judge: RoundEvaluation | None, data: Any
) -> tuple[int, int]:
    asked: list[tuple[int, Sequence[Prompt], int]] = []
    if sampler is not None:
        prompts = data.train_prompts(1)
        rows = min(sampler.batch_size, len(prompts) * sampler.samples)
        asked.append((rows, prompts, sampler.max_new_tokens))
    if judge is not None:
        rows, budget = judge.batch_size, judge.max_new_tokens
        asked += [(min(rows, len(some)), some, budget) for some in data.eval_prompts().values()]
    needs = ((n, max((len(p.ids) for p in some), default=0) + new) for n, some, new in asked)
    return max(needs, key=lambda need: need[0] * need[1], default=(0, 0))


def _longest_answer(data: Any) -> int:
    return int(as_table(data.fuse_pairs()).lengths()["chosen_ids"].max())


def _together(parts: Iterable[Amount]) -> Amount:
    return sum(parts, start=Amount())


def _steps(pairs: int, at_once: int) -> int:
    # what does not fill a batch of all processes is left out; fewer pairs make one smaller batch
    return max(pairs // at_once, 1) if pairs else 0


def devices(trainer: Trainer) -> int:
    """Return how many devices a fit runs on, those of all nodes."""
    return trainer.num_devices * trainer.num_nodes
