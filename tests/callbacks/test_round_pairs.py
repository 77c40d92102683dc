from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.callbacks.letters_run import (
    FUSION,
    context_of,
    fit,
    fuse_pairs,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tpmm_pl.callbacks import OfflinePairs, ReferenceMerge, TrajectorySnapshot, finish_round
from tpmm_pl.data.pairs import read_pairs, write_pairs
from tpmm_pl.data.table import PairTable
from tpmm_pl.files import file_sha256
from tpmm_pl.models.reference_cache import cached_logps
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.noise import LabelNoise
from tpmm_pl.toy.judges import LettersProxy
from tpmm_pl.toy.rewards import answer_pairs
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.types import InputError, Pair, PairLogps

FREE = SimpleNamespace(needs_reference=False)
SCORED = [(-7.0 - place, -9.0 - place) for place in range(16)]


def pairs_of(split: Any, logps: Sequence[tuple[float, float]]) -> list[Pair]:
    known = answer_pairs("data", "in_domain", split, 40, LettersProxy(), LabelNoise())
    return [
        replace(pair, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        for pair, (chosen, rejected) in zip(known, logps, strict=False)
    ]


class Known(SimpleNamespace):
    """Data whose pairs come with reference log-probabilities."""

    batch_size = 8
    logps = SCORED

    def train_pairs(self, round_index: int) -> list[Pair]:
        return pairs_of("train", self.logps)

    def fuse_pairs(self) -> list[Pair]:
        return pairs_of("fuse", self.logps)


def references(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    return [(pair.ref_chosen_logps, pair.ref_rejected_logps) for pair in pairs]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each pass has scored."""
    counts: list[int] = []

    def counted(model: Any, pairs: PairTable, folder: Path, **settings: Any) -> PairLogps:
        counts.append(len(pairs))
        return cached_logps(model, pairs, folder, **settings)

    monkeypatch.setattr("tpmm_pl.callbacks.round_pairs.cached_logps", counted)
    return counts


def test_without_need_of_a_reference_only_fuse_pairs_are_scored(
    start: LettersPolicy, tmp_path: Path, scored: list[int]
) -> None:
    context = context_of(tmp_path, start, receiver=FREE)
    callbacks = [TrajectorySnapshot(), letters_pairs()]
    finish_round(callbacks, context)
    finish_round(callbacks, context_of(tmp_path, start, 1, store=context.store, receiver=FREE))
    for index in (0, 1):
        assert all(
            isnan(value) for both in references(round_pairs(context.store, index)) for value in both
        )
        assert all(
            value < 0 for both in references(fuse_pairs(context.store, index)) for value in both
        )
    # what the start has sampled comes with its log-probabilities
    assert scored == [len(fuse_pairs(context.store, 1))]


def test_a_run_without_a_reference_learns_and_ships_a_merge(
    start: LettersPolicy, tmp_path: Path
) -> None:
    reference = ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=1)
    callbacks = [TrajectorySnapshot(), reference, letters_pairs()]
    store = fit(tmp_path, start, callbacks, loss="simpo", beta=2.0)
    recipe = store.record(2).recipe
    assert recipe is not None
    assert (recipe.strategy, recipe.snapshots) == ("learned", (0, 1, 2))
    assert set(store.record(2).ship) == {"merge", "average", "learned", "chosen"}
    assert isnan(round_pairs(store, 1)[0].ref_chosen_logps)
    assert store.source(2)["model.norm.weight"].isfinite().all()


def test_reference_columns_of_the_data_are_used_where_the_start_is_the_reference(
    start: LettersPolicy, tmp_path: Path, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path, start, data=Known())
    finish_round([TrajectorySnapshot(), ReferenceMerge("ema"), OfflinePairs()], context)
    assert scored == []
    assert references(fuse_pairs(context.store, 0)) == SCORED
    assert references(round_pairs(context.store, 0)) == SCORED
    said = [line for line in capsys.readouterr().err.splitlines() if "come with" in line]
    assert said == [
        f"{name}: the log-probabilities of the starting policy come with the data"
        for name in ("fuse pairs", "pairs of round 1")
    ]


def test_pairs_on_prompts_of_the_fuse_pairs_are_refused_unless_they_are_the_control(
    start: LettersPolicy, tmp_path: Path
) -> None:
    leaking = Known(train_pairs=lambda round_index: pairs_of("fuse", SCORED[:3]))
    context = context_of(tmp_path / "run", start, data=leaking)
    with pytest.raises(InputError, match="3 of 3 pairs for round 1 have prompts of the held-out"):
        finish_round([TrajectorySnapshot(), OfflinePairs()], context)
    assert context.store.record(0).pairs is None
    context = context_of(tmp_path / "control", start, data=leaking)
    finish_round([TrajectorySnapshot(), OfflinePairs(train_on_fuse_pairs=True)], context)
    assert len(round_pairs(context.store, 0)) == 3 + len(SCORED)


@pytest.mark.parametrize(("strategy", "used"), [("initial", True), ("last", False)])
def test_reference_columns_of_the_data_are_not_those_of_another_reference(
    strategy: str, used: bool, start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    known = Known(tokenizer=context.data.tokenizer)
    context.data = known
    finish_round([ReferenceMerge(strategy), OfflinePairs()], context)
    found = references(round_pairs(context.store, 1))
    logps = score_pairs(context.policy, known.train_pairs(2))
    under_the_last = list(zip(logps.chosen.tolist(), logps.rejected.tolist(), strict=True))
    assert found == (SCORED if used else under_the_last)


def test_where_one_pair_lacks_its_reference_all_are_computed(
    start: LettersPolicy, tmp_path: Path, scored: list[int]
) -> None:
    context = context_of(tmp_path, start, data=Known(logps=[*SCORED[:-1], (-7.0, nan)]))
    finish_round([TrajectorySnapshot(), OfflinePairs()], context)
    assert scored == [16, 16]
    known = context.data.train_pairs(1)
    logps = score_pairs(start.load_model(), known)
    assert [c for c, _ in references(round_pairs(context.store, 0))] == logps.chosen.tolist()


def test_the_hashes_of_pairs_are_recorded_and_checked(start: LettersPolicy, tmp_path: Path) -> None:
    stages = [TrajectorySnapshot(), ReferenceMerge("last", ship_steps=1), letters_pairs()]
    store = fit(tmp_path, start, stages, rounds=1)
    record = store.record(0)
    for name, digest in ((record.pairs, record.pairs_sha256), (record.fuse, record.fuse_sha256)):
        assert name is not None
        path = store.root / name
        assert digest == file_sha256(path)
        pairs = list(read_pairs(path))
        write_pairs(path, pairs[1:])
        with pytest.raises(InputError, match=rf"{path} is not the file that was written"):
            (round_pairs if name == record.pairs else fuse_pairs)(store, 0)
