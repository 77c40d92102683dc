"""Log-probabilities that sampling has kept are the reference's where the reference has sampled."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from tests.callbacks.letters_run import (
    FUSION,
    context_of,
    fuse_pairs,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tpmm_pl.callbacks import OnPolicyPairs, ReferenceMerge, RoundContext, finish_round
from tpmm_pl.models.reference_cache import cached_logps
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.models.weights import materialise
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.types import Pair, PairLogps


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each pass has scored."""
    counts: list[int] = []

    def counted(*args: Sequence[Pair], **settings: int) -> PairLogps:
        counts.append(len(args[1]))
        return cached_logps(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("tpmm_pl.callbacks.round_pairs.cached_logps", counted)
    return counts


def stored(pairs: Sequence[Pair]) -> torch.Tensor:
    return torch.tensor([(p.ref_chosen_logps, p.ref_rejected_logps) for p in pairs])


def under_the_reference(context: RoundContext, pairs: Sequence[Pair]) -> torch.Tensor:
    recipe = context.store.record(context.round_index).recipe
    assert recipe is not None
    materialise(context.policy, context.store, recipe)
    return torch.stack(score_pairs(context.policy, pairs), dim=1)


def finish(
    start: LettersPolicy, root: Path, merge: ReferenceMerge, **settings: bool
) -> RoundContext:
    context = snapshots(root, start, 2)
    for index in range(3):
        context = context_of(
            root, start, index, policy=context.policy, store=context.store, data=context.data
        )
        context.load_policy()
        finish_round([letters_pairs(**settings), merge], context)
    return context


@pytest.mark.parametrize("strategy", ["last", "uniform", "ema", "learned"])
def test_the_reference_has_sampled_its_own_pairs(
    strategy: str, start: LettersPolicy, tmp_path: Path, scored: list[int]
) -> None:
    merge = ReferenceMerge(strategy, fusion=FUSION, guard_kl=None, guard_weight=None, ship_steps=0)
    context = finish(start, tmp_path, merge)
    pairs = round_pairs(context.store, 2)
    expected = under_the_reference(context, pairs)
    # 2e-5: one pass samples token by token, the other scores the row
    torch.testing.assert_close(stored(pairs), expected, atol=2e-5, rtol=0)
    # fuse pairs are the start's to score from round 1 on
    assert scored == [len(fuse_pairs(context.store, index)) for index in (1, 2)]


def test_a_reference_that_has_not_sampled_scores(
    start: LettersPolicy, tmp_path: Path, scored: list[int]
) -> None:
    context = finish(start, tmp_path, ReferenceMerge("initial"))
    pairs = round_pairs(context.store, 2)
    assert torch.equal(stored(pairs), under_the_reference(context, pairs))
    assert len(scored) == 4


def test_pairs_of_several_samplers_are_scored(
    start: LettersPolicy, tmp_path: Path, scored: list[int]
) -> None:
    merge = ReferenceMerge("uniform", ship_steps=0)
    context = finish(start, tmp_path, merge, train_on_fuse_pairs=True)
    pairs = round_pairs(context.store, 2)
    assert torch.equal(stored(pairs), under_the_reference(context, pairs))
    assert len(scored) == 5


def test_numbers_of_lower_precision_are_computed_by_the_kernels_of_training(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 0)
    context.load_policy()
    sampled = OnPolicyPairs.scored_under
    assert sampled(letters_pairs(), context) is not None
    context.fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    assert sampled(letters_pairs(), context) is None
    context.fabric = Fabric(accelerator="cpu", devices=1)
    context.policy.bfloat16()
    assert sampled(letters_pairs(), context) is None
