from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from tests.callbacks.letters_run import (
    FUSION,
    Fixed,
    context_of,
    fit,
    fuse_pairs,
    letters_pairs,
    round_pairs,
)
from tpmm_pl.callbacks import (
    MixedPairs,
    OfflinePairs,
    OnPolicyPairs,
    ReferenceMerge,
    RoundCheckpoint,
    RoundContext,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.callbacks.mixed_pairs import mixed_counts
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rollouts.shards import Shard
from tpmm_pl.toy.judges import LettersProxy
from tpmm_pl.toy.module import LettersData
from tpmm_pl.toy.rewards import answer_pairs
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Completion, InputError, Pair, Prompt

COUNTS = st.integers(0, 500)
CLEAN = LabelNoise()


class LettersMix(LettersData):
    """Prompts and pairs of the letters task; counts the prompts that are asked for."""

    def __init__(self, pairs: int = 20, prompts: int = 40, batch_size: int = 8) -> None:
        super().__init__(
            batch_size=batch_size,
            prompts_per_round=prompts,
            start_fuse_prompts=6,
            fuse_prompts_per_round=6,
        )
        self.pairs = pairs

    def train_pairs(self, round_index: int) -> list[Pair]:
        key = f"offline/{round_index}"
        made = answer_pairs(key, "in_domain", "train", 2 * self.pairs, LettersProxy(), CLEAN)
        return made[: self.pairs]

    def fuse_pairs(self) -> list[Pair]:
        return answer_pairs("offline", "in_domain", "fuse", 10, LettersProxy(), CLEAN)


def mixed(ratio: float = 0.5, **on_policy: Any) -> MixedPairs:
    usual = {"method": "best_worst", "noise": LabelNoise(temperature=0.1)}
    return MixedPairs(letters_pairs(**{**usual, **on_policy}), OfflinePairs(), ratio)


def made(root: Path, start: LettersPolicy, pairs: MixedPairs, data: LettersMix) -> Sequence[Pair]:
    """Return the pairs of round 1."""
    context = context_of(root, start, data=data)
    finish_round([TrajectorySnapshot(), pairs], context)
    return round_pairs(context.store, 0)


def test_shards_answer_the_prompts_that_the_mix_has_use_for(
    start: LettersPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made(tmp_path / "whole", start, mixed(), LettersMix(10))
    context = context_of(tmp_path / "shards", start, data=LettersMix(10))
    pairs = mixed(wait_for_shards=2)
    finish_round([TrajectorySnapshot()], context)
    for number in (1, 2):
        pairs.make_shard(context, 1, Shard(number, 2))
    finish_round([pairs], context)
    assert "10 of 10 prompts come answered in shards" in capsys.readouterr().err
    assert round_pairs(context.store, 0) == whole


def count(pairs: Sequence[Pair]) -> tuple[int, int]:
    offline = sum(pair.prompt_id.startswith("offline/") for pair in pairs)
    return len(pairs) - offline, offline


@pytest.mark.parametrize(
    ("there", "ratio", "used"),
    [
        ((100, 100), 0.5, (100, 100)),
        ((100, 40), 0.5, (40, 40)),
        ((40, 100), 0.5, (40, 40)),
        ((100, 100), 0.25, (33, 100)),
        ((100, 100), 0.9, (100, 11)),
        ((3, 100), 0.3, (3, 7)),
        ((1, 100), 0.9, (1, 1)),
        ((0, 10), 0.5, (0, 10)),
        ((10, 0), 0.5, (10, 0)),
    ],
)
def test_the_largest_mix_at_a_ratio(
    there: tuple[int, int], ratio: float, used: tuple[int, int]
) -> None:
    assert mixed_counts(*there, ratio) == used


@settings(deadline=None, max_examples=200)
@given(COUNTS, COUNTS, st.floats(0.01, 0.99))
def test_a_mix_uses_one_kind_whole_and_keeps_the_ratio(
    on_policy: int, offline: int, ratio: float
) -> None:
    used = mixed_counts(on_policy, offline, ratio)
    assert used[0] <= on_policy
    assert used[1] <= offline
    assert used[0] == on_policy or used[1] == offline
    if on_policy and offline:
        # a pair more or less of the kind that was cut
        shares = [used[0] / (used[0] + used[1] + d) for d in (-1, 1)]
        shares += [(used[0] + d) / (used[0] + used[1] + d) for d in (-1, 1)]
        assert min(shares) <= ratio <= max(shares)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_round_has_the_ratio_and_both_kinds(
    ratio: float, start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start, data=LettersMix(pairs=20, prompts=100))
    logged: dict[str, float] = {}
    context.log = logged.update
    finish_round([TrajectorySnapshot(), mixed(ratio)], context)
    pairs = round_pairs(context.store, 0)
    on_policy, offline = count(pairs)
    assert on_policy / len(pairs) == pytest.approx(ratio, abs=1 / len(pairs))
    assert logged["pairs/on_policy"] == on_policy / len(pairs)
    assert logged["pairs/count"] == len(pairs)
    assert all(pair.ref_chosen_logps < 0 for pair in pairs)
    assert offline > 0


def test_no_more_prompts_are_answered_than_offline_pairs_can_be_mixed_with(
    start: LettersPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    pairs = mixed(0.25)

    def judge(completions: Sequence[Completion]) -> list[float]:
        answered.append(len({one.prompt.prompt_id for one in completions}))
        return LettersProxy()(completions)

    pairs.on_policy.annotator = judge
    made(tmp_path, start, pairs, LettersMix(pairs=21, prompts=50))
    # the fuse prompts, then 21 / 3
    assert answered == [6, 7]


@pytest.mark.filterwarnings("ignore:round 1")
def test_a_mix_is_the_same_again_and_another_of_another_seed(
    start: LettersPolicy, tmp_path: Path
) -> None:
    found = []
    for place, seed in enumerate((0, 0, 1)):
        context = context_of(tmp_path / str(place), start, data=LettersMix(prompts=5), seed=seed)
        finish_round([TrajectorySnapshot(), mixed()], context)
        found.append(round_pairs(context.store, 0))
    assert found[0] == found[1]
    offline = [{p.prompt_id for p in pairs if p.prompt_id.startswith("off")} for pairs in found]
    assert offline[0] != offline[2]


def test_too_few_on_policy_pairs_are_told_and_keep_the_ratio(
    start: LettersPolicy, tmp_path: Path
) -> None:
    sentence = (
        r"^round 1: 5 on-policy pairs are too few for 20 offline ones at ratio 0\.5; "
        r"15 offline pairs are left out$"
    )
    with pytest.warns(UserWarning, match=sentence):
        pairs = made(tmp_path, start, mixed(), LettersMix(prompts=5, batch_size=2))
    assert count(pairs) == (5, 5)


def test_too_few_offline_pairs_are_told_and_keep_the_ratio(
    start: LettersPolicy, tmp_path: Path
) -> None:
    sentence = (
        r"^round 1: 4 offline pairs are too few for 2\d on-policy ones at ratio 0\.5; "
        r"(19|20) on-policy pairs are left out$"
    )
    with pytest.warns(UserWarning, match=sentence):
        # four prompts, at most six pairs each
        pairs = made(tmp_path, start, mixed(method="all"), LettersMix(pairs=4, batch_size=2))
    assert count(pairs) == (4, 4)


def test_a_round_without_on_policy_pairs_says_so_and_trains_on_the_others(
    start: LettersPolicy, tmp_path: Path
) -> None:
    tied = mixed(annotator=lambda completions: [0.0] * len(completions), noise=CLEAN)
    sentence = r"there are no on-policy pairs, so all 20 pairs are offline, not a mix at ratio 0\.5"
    with pytest.warns(UserWarning, match=sentence):
        pairs = made(tmp_path, start, tied, LettersMix())
    assert count(pairs) == (0, 20)


def test_a_round_without_offline_pairs_answers_all_prompts(
    start: LettersPolicy, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="there are no offline pairs, so all 12 pairs are on-pol"):
        pairs = made(tmp_path, start, mixed(), LettersMix(pairs=0, prompts=12))
    assert count(pairs) == (12, 0)


def test_noise_of_the_annotator_is_that_of_on_policy_pairs_only(
    start: LettersPolicy, tmp_path: Path
) -> None:
    noisy = mixed(noise=LabelNoise(temperature=0.1, flip=1.0))
    pairs = made(tmp_path, start, noisy, LettersMix())
    assert {pair.flipped for pair in pairs if pair.prompt_id.startswith("offline/")} == {False}
    assert {pair.flipped for pair in pairs if not pair.prompt_id.startswith("offline/")} == {True}


def test_fuse_pairs_are_those_of_both(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, data=LettersMix())
    finish_round([TrajectorySnapshot(), mixed()], context)
    pairs, offline = fuse_pairs(context.store, 0), context.data.fuse_pairs()
    assert count(pairs)[1] == len(offline) > 0
    assert 0 < count(pairs)[0] <= 6
    assert all(pair.ref_chosen_logps < 0 for pair in pairs)
    later = RoundContext(context.policy, context.store, 1, data=context.data)
    finish_round([TrajectorySnapshot(), mixed()], later)
    assert count(fuse_pairs(context.store, 1))[1] == 0, "the data's come once"


class PromptsOnly:
    tokenizer = None

    def train_prompts(self, round_index: int) -> list[Prompt]:
        return []

    def fuse_prompts(self, round_index: int) -> list[Prompt]:
        return []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (PromptsOnly(), r"PromptsOnly has no pairs; use OnPolicyPairs, or data that has both"),
        (SimpleNamespace(), r"SimpleNamespace has no prompts; use OfflinePairs, or"),
    ],
)
def test_data_without_both_are_refused(
    data: Any, sentence: str, start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start)
    context.data = data
    with pytest.raises(
        InputError, match=f"^MixedPairs needs data with prompts and pairs, and {sentence}"
    ):
        finish_round([TrajectorySnapshot(), mixed()], context)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_ratio_that_is_no_mix_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="lies between 0 and 1: use OfflinePairs for 0 and OnPol"):
        mixed(ratio)


def test_a_part_that_would_train_on_fuse_pairs_by_itself_is_refused() -> None:
    with pytest.raises(InputError, match="is set on a part; set it on MixedPairs itself"):
        mixed(train_on_fuse_pairs=True)


def test_a_config_nests_the_two_kinds() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "pairs")
    on_policy = {
        "class_path": "tpmm_pl.callbacks.OnPolicyPairs",
        "init_args": {
            "annotator": {"class_path": "tpmm_pl.toy.judges.LettersProxy"},
            "method": "margin",
            "noise": {"length_bias": 0.2},
        },
    }
    config = {
        "class_path": "tpmm_pl.callbacks.MixedPairs",
        "init_args": {
            "ratio": 0.25,
            "on_policy": on_policy,
            "offline": {"class_path": "tpmm_pl.callbacks.OfflinePairs"},
        },
    }
    pairs = parser.instantiate_classes(parser.parse_object({"pairs": config})).pairs
    assert isinstance(pairs, MixedPairs)
    assert isinstance(pairs.on_policy, OnPolicyPairs)
    assert isinstance(pairs.offline, OfflinePairs)
    assert (pairs.ratio, pairs.on_policy.method) == (0.25, "margin")
    assert pairs.on_policy.noise == LabelNoise(length_bias=0.2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own handling may run on it."""


def train(root: Path, start: LettersPolicy, *, kill: bool = False, resume: bool = False) -> Any:
    def stop(context: RoundContext) -> None:
        if kill and context.round_index == 1:
            raise Killed

    callbacks = [
        Fixed("pairs", stop),
        TrajectorySnapshot(),
        ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=1),
        mixed(),
        RoundCheckpoint(),
    ]
    checkpoint = root / "checkpoints" / "last.ckpt" if resume else None
    return fit(root, start, callbacks, data=LettersMix(pairs=8), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:round ")
def test_a_killed_run_resumes_to_the_same_pairs_and_weights(
    start: LettersPolicy, tmp_path: Path
) -> None:
    unbroken: TrajectoryStore = train(tmp_path / "unbroken", start)
    with pytest.raises(Killed):
        train(tmp_path / "killed", start, kill=True)
    resumed: TrajectoryStore = train(tmp_path / "killed", start, resume=True)
    assert [record.sha256 for record in resumed.rounds] == [r.sha256 for r in unbroken.rounds]
    assert len(unbroken.rounds) == 3
    for index in (0, 1):
        assert round_pairs(resumed, index) == round_pairs(unbroken, index)
        assert all(count(round_pairs(resumed, index)))
