from __future__ import annotations

import json
import shutil
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy

from tests.callbacks.letters_run import (
    FUSION,
    context_of,
    fit,
    fit_with,
    fuse_pairs,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tests.callbacks.recorder import Recorder
from tpmm_pl.callbacks import ReferenceMerge, RoundContext, TrajectorySnapshot, finish_round
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.rounds import entropy
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Recipe


class Forced(ReferenceMerge):
    """Learns one-hot coefficients, whatever the pairs say."""

    def __init__(self, newest: bool) -> None:
        super().__init__("learned", next_policy="last", guard_weight=None, guard_kl=None)
        self.newest = newest

    def learn(self, context: RoundContext, steps: int, stage: str) -> Recipe:
        places = range(context.round_index + 1)
        wanted = context.round_index if self.newest else 0
        row = tuple(float(place == wanted) for place in places)
        return Recipe("learned", tuple(places), (row,))


def assert_same_run(run: TrajectoryStore, other: TrajectoryStore) -> None:
    assert [r.round for r in run.rounds] == [0, 1, 2, 3]
    assert [r.sha256 for r in run.rounds] == [r.sha256 for r in other.rounds]
    for index in range(3):
        assert round_pairs(run, index) == round_pairs(other, index)


@pytest.fixture(scope="module")
def last(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    return fit_with(tmp_path_factory.mktemp("last"), start, ReferenceMerge("last"))


@pytest.fixture(scope="module")
def initial(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    return fit_with(tmp_path_factory.mktemp("initial"), start, ReferenceMerge("initial"))


@pytest.fixture(scope="module")
def trajectory(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> RoundContext:
    """The start and two more policies, with fuse pairs of every round."""
    context = snapshots(tmp_path_factory.mktemp("trajectory"), start, 2)
    for index in range(3):
        asked = RoundContext(context.policy, context.store, index, data=context.data)
        letters_pairs().write_fuse_pairs(asked)
    return context


@pytest.fixture
def context(trajectory: RoundContext, tmp_path: Path) -> RoundContext:
    """After round 2 of that trajectory, in a folder of its own."""
    shutil.copytree(trajectory.store.root, tmp_path / "trajectory")
    store = TrajectoryStore(tmp_path / "trajectory")
    return RoundContext(trajectory.policy, store, 2, data=trajectory.data)


def test_last_and_initial_are_different_runs(
    last: TrajectoryStore, initial: TrajectoryStore
) -> None:
    assert last.record(1).sha256 == initial.record(1).sha256
    assert last.record(2).sha256 != initial.record(2).sha256


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(ReferenceMerge("window", window=1), id="window_of_one"),
        pytest.param(ReferenceMerge("ema", alpha=1.0, next_policy="last"), id="ema_alpha_1"),
        pytest.param(Forced(newest=True), id="learned_one_hot_newest"),
    ],
)
def test_all_weight_on_the_newest_policy_is_iterative_dpo_bit_for_bit(
    reference: ReferenceMerge, last: TrajectoryStore, start: LettersPolicy, tmp_path: Path
) -> None:
    assert_same_run(fit_with(tmp_path, start, reference), last)


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(ReferenceMerge("ema", alpha=0.0, next_policy="last"), id="ema_alpha_0"),
        pytest.param(Forced(newest=False), id="learned_one_hot_start"),
    ],
)
def test_all_weight_on_the_start_is_a_fixed_reference_bit_for_bit(
    reference: ReferenceMerge, initial: TrajectoryStore, start: LettersPolicy, tmp_path: Path
) -> None:
    assert_same_run(fit_with(tmp_path, start, reference), initial)


@pytest.mark.parametrize("strategy", ["uniform", "ema", "learned"])
def test_every_round_starts_at_log_2_when_the_next_policy_is_the_merge(
    strategy: str, start: LettersPolicy, tmp_path: Path
) -> None:
    recorder = Recorder()
    reference = ReferenceMerge(strategy, fusion=FUSION, guard_kl=None, ship_steps=2)
    assert reference.next_policy == "merge"
    fit(tmp_path, start, [TrajectorySnapshot(), reference, letters_pairs(), recorder], rounds=3)
    assert len(recorder.losses) == 3
    for losses in recorder.losses:
        assert losses[0] == pytest.approx(log(2), abs=1e-5)
        assert losses[-1] != pytest.approx(log(2), abs=1e-4)
    assert recorder.fresh == [True] * 3


def test_a_learned_recipe_is_recorded_with_its_curve_and_logged(context: RoundContext) -> None:
    logged: dict[str, float] = {}
    context.log = logged.update
    finish_round([ReferenceMerge(fusion=FUSION)], context)
    store = TrajectoryStore(context.store.root)
    recipe = store.record(2).recipe
    assert recipe is not None
    assert (recipe.strategy, recipe.snapshots) == ("learned", (0, 1, 2))
    assert sum(recipe.coefficients[0]) == pytest.approx(1)
    written = json.loads((store.folder(2) / "recipe.json").read_text())
    assert Recipe.from_json(written) == recipe
    assert written["sha256"] == store.recipe_sha256(recipe)
    curve = json.loads((store.folder(2) / "fusion.json").read_text())
    assert len(curve["loss"]) == curve["steps"] == FUSION.steps
    weights = [logged[f"fusion/weight_{index:02d}"] for index in range(3)]
    assert weights == list(recipe.coefficients[0])
    assert logged["fusion/entropy"] == curve["entropy"] == entropy(recipe)
    assert logged["fusion/kl_merge_sft"] < 10


def test_the_fit_of_shipping_has_a_curve_of_its_own(context: RoundContext) -> None:
    context.final = True
    finish_round([ReferenceMerge(fusion=FUSION, ship_steps=3, ship="learned")], context)
    folder = context.store.folder(2)
    assert json.loads((folder / "fusion.json").read_text())["steps"] == FUSION.steps
    assert json.loads((folder / "ship.json").read_text())["steps"] == 3
    ship = context.store.record(2).ship
    assert set(ship) == {"merge", "average", "learned", "chosen"}
    assert ship["chosen"] == ship["learned"] != ship["merge"] == context.store.record(2).recipe
    assert ship["average"].coefficients == ((1 / 3,) * 3,)


@pytest.mark.parametrize(
    ("guards", "sentence"),
    [
        ({"guard_weight": 0.01}, r"learned weight 0\.\d\d on the newest policy"),
        ({"guard_kl": -100.0}, "learned merge at KL"),
    ],
)
def test_the_guard_falls_back_to_uniform_and_says_so(
    guards: dict[str, float], sentence: str, context: RoundContext
) -> None:
    with pytest.warns(UserWarning, match=f"round 2: {sentence}.*; the reference is the plain av"):
        finish_round([ReferenceMerge(fusion=FUSION, **guards)], context)  # type: ignore[arg-type]
    record = TrajectoryStore(context.store.root).record(2)
    assert record.recipe == Recipe("uniform", (0, 1, 2), ((1 / 3, 1 / 3, 1 / 3),))
    assert record.notes["guard"].startswith("guard: learned")


def test_the_guard_of_the_weight_leaves_two_snapshots_alone(context: RoundContext) -> None:
    context.round_index = 1
    finish_round([ReferenceMerge(fusion=FUSION, guard_weight=0.0)], context)
    assert context.store.record(1).notes == {}


@pytest.mark.parametrize(
    ("lr", "sentence"),
    [(1e-7, "fusion did not move"), (1e3, "fusion collapsed to the snapshot of round")],
)
def test_a_fit_that_did_not_move_or_collapsed_is_warned_of(
    lr: float, sentence: str, context: RoundContext
) -> None:
    fusion = FusionSettings(steps=2, batch_size=8, lr=lr)
    reference = ReferenceMerge(fusion=fusion, guard_kl=None, guard_weight=None)
    with pytest.warns(UserWarning, match=f"^round 2: {sentence}"):
        finish_round([reference], context)
    assert context.store.record(2).notes["fuse"].startswith(sentence)


def test_a_control_arm_trains_on_the_fuse_pairs(start: LettersPolicy, tmp_path: Path) -> None:
    plain, control = tmp_path / "plain", tmp_path / "control"
    for root, added in ((plain, False), (control, True)):
        pairs = letters_pairs(train_on_fuse_pairs=added)
        reference = ReferenceMerge("last", fusion=FUSION, ship_steps=2)
        fit(root, start, [TrajectorySnapshot(), reference, pairs], rounds=1)
    without, store = (TrajectoryStore(root / "trajectory") for root in (plain, control))
    bare = {(p.prompt_id, p.chosen, p.rejected) for p in round_pairs(without, 0)}
    fuse = {(p.prompt_id, p.chosen, p.rejected) for p in fuse_pairs(store, 0)}
    assert {(p.prompt_id, p.chosen, p.rejected) for p in round_pairs(store, 0)} == bare | fuse
    assert not bare & fuse
    assert store.record(0).notes == {"control": "fuse pairs are trained on"}
    assert set(store.record(1).ship) == {"merge", "average", "chosen"}, "nothing is learned"


def test_a_control_arm_that_learns_is_refused_before_it_trains(
    start: LettersPolicy, tmp_path: Path
) -> None:
    recorder = Recorder()
    pairs = letters_pairs(train_on_fuse_pairs=True)
    callbacks = [TrajectorySnapshot(), ReferenceMerge("learned"), pairs, recorder]
    with pytest.raises(InputError, match="train_on_fuse_pairs adds them to training; choose"):
        fit(tmp_path, start, callbacks)
    assert recorder.losses == []


def test_learning_without_held_out_pairs_is_refused(start: LettersPolicy, tmp_path: Path) -> None:
    context = snapshots(tmp_path, start, 1)
    with pytest.raises(InputError, match=r"need held-out pairs, and .* has none; set data.fuse"):
        finish_round([ReferenceMerge("learned")], context)


def test_shipping_a_learned_merge_needs_held_out_pairs(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    context.final = True
    with pytest.raises(InputError, match="learned coefficients need held-out pairs, and"):
        finish_round([ReferenceMerge("uniform", ship="learned")], context)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(InputError, match="unknown strategy 'lerned'; did you mean learned"):
        ReferenceMerge("lerned")


def test_by_default_the_last_policy_trains_on_under_last_initial_and_window() -> None:
    names = ("last", "initial", "window", "uniform", "ema", "learned")
    found = {name: ReferenceMerge(name).next_policy for name in names}
    assert list(found.values()) == ["last"] * 3 + ["merge"] * 3


def test_the_next_policy_is_the_merge_bit_for_bit(start: LettersPolicy, tmp_path: Path) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_round([ReferenceMerge("uniform")], context)
    first, second = (context.store.source(index) for index in (0, 1))
    for name, parameter in context.policy.named_parameters():
        assert torch.equal(parameter, 0.5 * first[name] + 0.5 * second[name]), name


def test_learning_without_held_out_pairs_is_refused_before_the_first_round(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start)
    with pytest.raises(InputError, match="learned coefficients need held-out pairs, and"):
        finish_round([TrajectorySnapshot(), ReferenceMerge("learned")], context)


def test_a_learned_fit_for_shipping_needs_steps() -> None:
    with pytest.raises(InputError, match="ship: learned needs ship_steps above 0"):
        ReferenceMerge("uniform", ship="learned", ship_steps=0)


def test_no_merge_is_handed_to_a_strategy_that_would_write_over_it() -> None:
    trainer: Any = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(InputError, match=r"set reference\.next_policy to last"):
        ReferenceMerge("learned").setup(trainer, LightningModule(), "fit")
    ReferenceMerge("learned", next_policy="last").setup(trainer, LightningModule(), "fit")
