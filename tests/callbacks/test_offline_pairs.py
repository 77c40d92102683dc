from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.callbacks.letters_run import context_of, fit, fuse_pairs, round_pairs
from tests.models.tiny import WORDS, tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import OfflinePairs, ReferenceMerge, TrajectorySnapshot, finish_round
from tpmm_pl.data.module import PreferenceData
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    root = tmp_path_factory.mktemp("offline")
    export_model(tiny_llama(), tiny_tokenizer(), None, root / "model")
    rows = [
        {"prompt": f"{one} {two} ", "chosen": one, "rejected": two}
        for one, two in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(root / "pairs.jsonl", fuse_fraction=0.25, batch_size=4)
    source = PretrainedPolicy(str(root / "model"))
    fusion = FusionSettings(steps=2, batch_size=4)
    reference = ReferenceMerge("learned", fusion=fusion, ship_steps=2)
    return fit(root, source, [TrajectorySnapshot(), reference, OfflinePairs()], data=data)


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


def test_data_without_pairs_are_refused(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start)
    with pytest.raises(InputError, match="data with pairs, and LettersData has none; use OnPol"):
        finish_round([TrajectorySnapshot(), OfflinePairs()], context)
