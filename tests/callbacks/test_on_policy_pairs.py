from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.callbacks.letters_run import (
    context_of,
    fuse_pairs,
    letters_data,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tpmm_pl.callbacks import ReferenceMerge, RoundContext, TrajectorySnapshot, finish_round
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rollouts import ServerGeneration, sample_completions
from tpmm_pl.rollouts.shards import Shard
from tpmm_pl.rounds import one_hot
from tpmm_pl.toy.judges import LettersProxy
from tpmm_pl.toy.letters import split_of
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.types import Completion, InputError, Pair, RunError


def tied(completions: Sequence[Completion]) -> list[float]:
    return [0.0] * len(completions)


def test_pairs_of_both_kinds_come_from_their_own_prompts(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start)
    finish_round([TrajectorySnapshot(), letters_pairs()], context)
    for pairs, split, name in (
        (round_pairs(context.store, 0), "train", "round-001"),
        (fuse_pairs(context.store, 0), "fuse", "fuse-000"),
    ):
        assert pairs
        assert {split_of(pair.prompt) for pair in pairs} == {split}
        assert {pair.prompt_id[:-5] for pair in pairs} == {name}


def test_training_pairs_are_sampled_from_the_next_policy_and_fuse_pairs_from_the_last(
    start: LettersPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = snapshots(tmp_path, start, 1)
    start_weight = context.store.source(0)["model.embed_tokens.weight"]
    last_weight = context.store.source(1)["model.embed_tokens.weight"]
    held: dict[str, tuple[bool, bool]] = {}

    def recorded(model: LettersPolicy, *rest: object, **settings: str) -> list[Completion]:
        weight = context.policy.get_parameter("model.embed_tokens.weight")
        same = bool((weight == start_weight).all()), bool((weight == last_weight).all())
        held[settings["key"].rpartition("/")[2]] = same
        return sample_completions(model, *rest, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("tpmm_pl.rollouts.generation.sample_completions", recorded)
    merge = ReferenceMerge("initial", next_policy="merge")
    finish_round([letters_pairs(), merge], context)
    assert held == {"fuse_pairs": (False, True), "pairs": (True, False)}


def test_fuse_pairs_are_scored_under_the_start(start: LettersPolicy, tmp_path: Path) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_round([letters_pairs(), ReferenceMerge("last")], context)
    pairs = fuse_pairs(context.store, 1)
    logps = score_pairs(start.load_model(), pairs)
    assert [pair.ref_chosen_logps for pair in pairs] == logps.chosen.tolist()
    assert [pair.ref_rejected_logps for pair in pairs] == logps.rejected.tolist()


def test_a_bad_batch_of_annotation_touches_the_training_pairs_of_its_round_only(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 2)
    pairs = letters_pairs(noise=LabelNoise(), flip_in_rounds={2: 1.0})
    for index in range(3):
        finish_round([pairs], RoundContext(context.policy, context.store, index, data=context.data))
    flipped = [{pair.flipped for pair in round_pairs(context.store, index)} for index in range(3)]
    assert flipped == [{False}, {True}, {False}]
    for index in range(3):
        assert not any(pair.flipped for pair in fuse_pairs(context.store, index))


def test_another_flip_rate_of_a_round_keeps_the_other_noise() -> None:
    noise = LabelNoise(temperature=0.1, flip=0.2, length_bias=0.3, low_margin=0.4)
    pairs = letters_pairs(noise=noise, flip_in_rounds={2: 1.0})
    assert pairs.noise_in_rounds == {2: replace(noise, flip=1.0)}


def test_pairs_below_the_margin_are_left_out(start: LettersPolicy, tmp_path: Path) -> None:
    found = []
    for margin in (0.0, 0.1):
        context = context_of(tmp_path / str(margin), start, data=letters_data(batch_size=1))
        pairs = letters_pairs(noise=LabelNoise(), method="all", min_margin=margin)
        finish_round([TrajectorySnapshot(), pairs], context)
        margins = [p.score_chosen - p.score_rejected for p in round_pairs(context.store, 0)]
        found.append(sorted(margins))
    assert found[1] == [margin for margin in found[0] if margin >= 0.1]
    assert 0 < len(found[1]) < len(found[0])


def test_an_unknown_method_is_refused_before_anything_is_sampled() -> None:
    with pytest.raises(InputError, match=r"unknown pairing method 'best'; did you mean best_wor"):
        letters_pairs(method="best")


def test_a_round_without_any_pair_ends_the_run_and_says_what_to_do(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start)
    pairs = letters_pairs(annotator=tied, noise=LabelNoise())
    with pytest.raises(RunError, match=r"^round 1 has no pairs: .*resume with --ckpt_path last$"):
        finish_round([TrajectorySnapshot(), pairs], context)
    assert context.store.record(0).pairs is None
    assert context.store.record(0).fuse is None


def test_fewer_pairs_than_a_batch_are_warned_of(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, data=letters_data(batch_size=1000))
    logged: dict[str, float] = {}
    context.log = logged.update
    with pytest.warns(UserWarning, match=r"^round 1 trains on \d+ pairs, fewer than a batch of 10"):
        finish_round([TrajectorySnapshot(), letters_pairs()], context)
    pairs = round_pairs(context.store, 0)
    assert logged["pairs/count"] == len(pairs)
    assert logged["pairs/flipped"] == sum(pair.flipped for pair in pairs) / len(pairs)


def test_the_batch_size_of_sampling_does_not_change_the_pairs(
    start: LettersPolicy, tmp_path: Path
) -> None:
    found = []
    for size in (3, 256):
        context = context_of(tmp_path / str(size), start)
        finish_round([TrajectorySnapshot(), letters_pairs(batch_size=size)], context)
        found.append([(p.prompt_id, p.chosen_ids) for p in round_pairs(context.store, 0)])
    assert found[0] == found[1]


def test_data_without_prompts_are_refused(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start)
    finish_round([TrajectorySnapshot()], context)
    context.data = SimpleNamespace(tokenizer=None)
    with pytest.raises(InputError, match="data with prompts, and SimpleNamespace has none; use"):
        finish_round([letters_pairs()], context)


def test_shards_are_paired_as_what_is_sampled_in_one_piece(
    start: LettersPolicy, tmp_path: Path
) -> None:
    found = []
    for shards in (0, 2, 3):
        context = context_of(tmp_path / str(shards), start)
        # of 16 prompts four at once
        pairs = letters_pairs(batch_size=16, method="best_random")
        finish_round([TrajectorySnapshot()], context)
        for number in range(1, shards + 1):
            pairs.make_shard(context, 1, Shard(number, shards))
        finish_round([pairs], context)
        found.append(round_pairs(context.store, 0))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 8


def test_shards_that_are_waited_for_end_the_fit_in_front_of_the_pairs(
    start: LettersPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path, start)
    pairs = letters_pairs(wait_for_shards=2)
    with pytest.raises(SystemExit) as ended:
        finish_round([TrajectorySnapshot(), pairs], context)
    assert ended.value.code == 0
    command = f"`tpmm pairs {tmp_path} --round 1 --shard 1/2`"
    assert f"round 1 waits for the completions of shard 1/2, 2/2: run {command}" in (
        capsys.readouterr().out
    )
    assert context.store.record(0).pairs is None
    # what came before is kept
    assert context.store.record(0).fuse is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.5}, "temperature 1.0, and this run has 0.5"),
        ({"samples": 3}, "samples 4, and this run has 3"),
        ({"max_new_tokens": 5}, "max_new_tokens 6, and this run has 5"),
        ({"annotator": LettersProxy(bias=0.7)}, "annotator "),
        ({"generation": ServerGeneration(["http://node1"])}, "generation TransformersGeneration"),
    ],
)
def test_a_shard_of_other_settings_is_refused(
    change: dict[str, Any], named: str, start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start)
    finish_round([TrajectorySnapshot()], context)
    path = letters_pairs().make_shard(context, 1, Shard(1, 2))
    with pytest.raises(InputError, match=f"{path.name} was made with {named}"):
        letters_pairs(**change).training_pairs(context, 1)


def test_a_shard_of_another_policy_or_other_prompts_is_refused(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    pairs = letters_pairs()
    path = pairs.make_shard(context, 2, Shard(1, 1))
    context.data.prompts_per_round = 12
    with pytest.raises(InputError, match=f"{path.name} was made with prompts "):
        pairs.training_pairs(context, 2)
    context.data.prompts_per_round = 16
    context.set_next_policy(one_hot(0))
    with pytest.raises(InputError, match=f"{path.name} was made with policy "):
        pairs.training_pairs(context, 2)


def _pairs_of_one_process(rank: int, store: str, start: LettersPolicy) -> Sequence[Pair]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made = _pairs_of(start, Path(store).parent / f"run_{rank}")
    dist.destroy_process_group()
    return made


def _pairs_of(start: LettersPolicy, root: Path) -> Sequence[Pair]:
    context = context_of(root, start)
    return letters_pairs(batch_size=16, method="best_random").training_pairs(context, 1)


@pytest.mark.slow
def test_two_processes_make_the_pairs_of_one(start: LettersPolicy, tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    arguments = [(rank, f"{tmp_path}/store", start) for rank in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_pairs_of_one_process, arguments)
    alone = _pairs_of(start, tmp_path / "alone")
    assert results == [alone, alone]
    assert len(alone) > 8


@pytest.mark.parametrize("setting", ["samples", "fuse_samples"])
def test_one_sample_makes_no_pair(setting: str) -> None:
    with pytest.raises(InputError, match="must be at least 2 for a pair"):
        letters_pairs(**{setting: 1})
