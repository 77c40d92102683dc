from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from tests.callbacks.letters_run import context_of, fit, fuse_pairs, round_pairs
from tests.models.tiny import WORDS, tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import (
    MixedPairs,
    OfflinePairs,
    OnPolicyPairs,
    ReferenceMerge,
    RoundContext,
    RoundEvaluation,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.data.module import PreferenceData
from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.noise import LabelNoise
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair


def source_in(root: Path) -> PretrainedPolicy:
    export_model(tiny_llama(), tiny_tokenizer(), None, root / "model")
    return PretrainedPolicy(str(root / "model"))


def data_in(root: Path, **settings: Any) -> PreferenceData:
    rows = [
        {"prompt": f"{one} {two} ", "chosen": one, "rejected": two}
        for one, two in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"fuse_fraction": 0.25, "batch_size": 4, "cache_dir": root / "cache"}
    return PreferenceData(root / "pairs.jsonl", **{**usual, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    root = tmp_path_factory.mktemp("offline")
    fusion = FusionSettings(steps=2, batch_size=4)
    reference = ReferenceMerge("learned", fusion=fusion, ship_steps=2)
    callbacks = [TrajectorySnapshot(), reference, OfflinePairs()]
    return fit(root, source_in(root), callbacks, data=data_in(root))


def is_swapped(pair: Pair) -> bool:
    # the word that comes first in the prompt is the better answer
    return pair.prompt.split()[0] != pair.chosen


def test_every_round_has_a_shard_of_its_own_and_none_of_the_fuse_pairs(
    run: TrajectoryStore,
) -> None:
    first, second = ({pair.prompt_id for pair in round_pairs(run, index)} for index in (0, 1))
    held_out = {pair.prompt_id for pair in fuse_pairs(run, 0)}
    assert len(first) == len(second) >= 8
    assert not first & second
    assert held_out
    assert not held_out & (first | second)


def test_held_out_pairs_are_written_after_the_start_only(run: TrajectoryStore) -> None:
    assert [record.fuse is None for record in run.rounds] == [False, True, True]


def test_offline_pairs_are_enough_to_learn_a_merge(run: TrajectoryStore) -> None:
    recipe = run.record(2).recipe
    assert recipe is not None
    assert (recipe.strategy, len(recipe.snapshots)) == ("learned", 3)


def test_noise_of_the_data_is_recorded_in_every_row(tmp_path: Path) -> None:
    data = data_in(tmp_path, noise=LabelNoise(flip=0.5))
    logged: list[dict[str, float]] = []

    class Logged(OfflinePairs):
        def write_training_pairs(self, context: RoundContext) -> None:
            context.log = lambda metrics: logged.append(dict(metrics))
            super().write_training_pairs(context)

    callbacks = [TrajectorySnapshot(), Logged(), RoundEvaluation()]
    store = fit(tmp_path, source_in(tmp_path), callbacks, data=data)
    for index in (0, 1):
        pairs = round_pairs(store, index)
        assert [pair.flipped for pair in pairs] == [is_swapped(pair) for pair in pairs]
        share = sum(pair.flipped for pair in pairs) / len(pairs)
        assert 0 < share < 1
        assert logged[index]["pairs/flipped"] == share
    held_out = fuse_pairs(store, 0)
    assert [pair.flipped for pair in held_out] == [is_swapped(pair) for pair in held_out]
    evaluated = read_pairs(store.folder(0) / "held_out_in_domain.parquet")
    assert evaluated
    assert not any(pair.flipped or is_swapped(pair) for pair in evaluated)


@pytest.mark.filterwarnings("ignore:round ")
def test_preference_data_offers_what_a_mix_needs(tmp_path: Path) -> None:
    on_policy = OnPolicyPairs(
        lambda completions: [float(sum(one.ids)) for one in completions],
        samples=2,
        max_new_tokens=4,
    )
    mixed = MixedPairs(on_policy, OfflinePairs(), ratio=0.5)
    store = fit(
        tmp_path, source_in(tmp_path), [TrajectorySnapshot(), mixed], data=data_in(tmp_path)
    )
    held_out = {pair.prompt_id for index in (0, 1, 2) for pair in fuse_pairs(store, index)}
    for index in (0, 1):
        pairs = round_pairs(store, index)
        judged = [pair for pair in pairs if isfinite(pair.score_chosen)]
        assert len(judged) == len(pairs) / 2 > 0
        assert not held_out & {pair.prompt_id for pair in pairs}


def test_data_without_pairs_are_refused(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start)
    with pytest.raises(InputError, match="data with pairs, and LettersData has none; use OnPol"):
        finish_round([TrajectorySnapshot(), OfflinePairs()], context)
