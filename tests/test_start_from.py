"""A trajectory that begins with checkpoints made elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.callbacks.letters_run import FUSION, fit, letters_pairs
from tests.callbacks.recorder import Recorder
from tpmm_pl.callbacks import (
    ReferenceMerge,
    RoundCallback,
    RoundCheckpoint,
    RoundContext,
    TrajectorySnapshot,
)
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.callbacks.round_context import Stage
from tpmm_pl.models.export import export_model
from tpmm_pl.models.weights import materialise
from tpmm_pl.rounds import one_hot
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

ROUNDS, GIVEN = 4, 2


class Killed(BaseException):
    pass


class KillAtStage(RoundCallback):
    def __init__(self, stage: str, round_index: int) -> None:
        super().__init__()
        self.stage, self.round_index = stage, round_index

    def stages(self) -> dict[str, Stage]:
        return {self.stage: self.kill}

    def kill(self, context: RoundContext) -> None:
        if context.round_index == self.round_index:
            raise Killed


def run(
    root: Path,
    start: LettersPolicy,
    start_from: list[str],
    *,
    rounds: int = ROUNDS,
    epochs_per_round: int = 1,
    kill: Callback | None = None,
    resume: bool = False,
) -> TrajectoryStore:
    checkpoint = root / CHECKPOINT
    return fit(
        root,
        start,
        [
            *([kill] if kill is not None else []),
            TrajectorySnapshot(start_from),
            ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=1),
            letters_pairs(),
            RoundCheckpoint(every_n_steps=2),
        ],
        rounds=rounds,
        epochs_per_round=epochs_per_round,
        schedule="cosine",
        ckpt_path=checkpoint if resume and checkpoint.exists() else None,
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LettersPolicy:
    cache = tmp_path_factory.mktemp("start")
    policy = LettersPolicy(
        hidden=16, layers=2, heads=2, ffn=32, steps=30, batch_size=16, cache_dir=cache
    )
    policy.prepare()
    return policy


@pytest.fixture(scope="module")
def unbroken(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    return run(tmp_path_factory.mktemp("unbroken"), start, [])


@pytest.fixture(scope="module")
def checkpoints(
    start: LettersPolicy, unbroken: TrajectoryStore, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The policies of the first rounds, as any trainer would leave them."""
    folder, policy = tmp_path_factory.mktemp("checkpoints"), start.load_model()
    for index in range(1, GIVEN + 1):
        materialise(policy, unbroken, one_hot(index))
        export_model(policy, start.load_tokenizer(), None, folder / str(index))
    return [str(folder / str(index)) for index in range(1, GIVEN + 1)]


def assert_same(store: TrajectoryStore, unbroken: TrajectoryStore) -> None:
    store = TrajectoryStore(store.root)
    assert [record.sha256 for record in store.rounds] == [r.sha256 for r in unbroken.rounds]
    assert [record.recipe for record in store.rounds] == [r.recipe for r in unbroken.rounds]


def test_training_goes_on_from_given_checkpoints_as_the_run_that_made_them(
    start: LettersPolicy, unbroken: TrajectoryStore, checkpoints: list[str], tmp_path: Path
) -> None:
    store = run(tmp_path, start, checkpoints)
    assert_same(store, unbroken)
    notes = [record.notes.get("start_from") for record in store.rounds]
    assert notes == [None, *(f"given: {folder}" for folder in checkpoints), None, None]
    # nothing trains on the pairs of a round that was given
    assert [record.pairs is None for record in store.rounds] == [True, True, False, False, True]
    assert [bool(record.seconds.get("train")) for record in store.rounds] == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_the_first_reference_covers_the_given_checkpoints(
    start: LettersPolicy, checkpoints: list[str], tmp_path: Path
) -> None:
    store = run(tmp_path, start, checkpoints, rounds=3, epochs_per_round=2)
    recipe = store.record(GIVEN).recipe
    assert recipe is not None
    assert recipe.snapshots == (0, 1, 2)
    assert [record.round for record in store.rounds] == [0, 1, 2, 3]
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    # of the protecting checkpoint of the last round: two epochs of one trained round
    assert checkpoint["epoch"] + 1 == 3 * 2


@pytest.mark.parametrize(
    ("stage", "round_index"),
    [("fuse", 1), ("pairs", GIVEN), ("snapshot", GIVEN + 1), ("checkpoint", GIVEN + 1)],
)
def test_a_killed_run_of_given_checkpoints_resumes_to_the_same_weights(
    stage: str,
    round_index: int,
    start: LettersPolicy,
    unbroken: TrajectoryStore,
    checkpoints: list[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, start, checkpoints, kill=KillAtStage(stage, round_index))
    assert_same(run(tmp_path, start, checkpoints, resume=True), unbroken)


class KillAtStart(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise Killed


def test_a_run_killed_before_its_first_step_starts_again_from_the_newest_checkpoint(
    start: LettersPolicy, unbroken: TrajectoryStore, checkpoints: list[str], tmp_path: Path
) -> None:
    # nothing but snapshots and pairs: no stage is left that would load a policy by itself
    with pytest.raises(Killed):
        fit(
            tmp_path,
            start,
            [TrajectorySnapshot(checkpoints), letters_pairs(), KillAtStart()],
            rounds=3,
        )
    recorder = Recorder()
    fit(tmp_path, start, [TrajectorySnapshot(checkpoints), letters_pairs(), recorder], rounds=3)
    newest = unbroken.source(GIVEN)
    assert len(recorder.starts) == 1
    for name, tensor in recorder.starts[0].items():
        assert torch.equal(tensor, newest[name]), name


def test_one_folder_needs_no_list(tmp_path: Path) -> None:
    snapshot = TrajectorySnapshot(str(tmp_path))
    assert (snapshot.start_from, snapshot.given_rounds) == ([tmp_path], 1)


def test_rounds_count_the_given_ones(
    start: LettersPolicy, checkpoints: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"gives 2 rounds, so rounds must be at least 3"):
        run(tmp_path, start, checkpoints, rounds=GIVEN)
    assert not (tmp_path / "trajectory").exists()


def test_a_folder_that_trained_its_rounds_is_not_taken_for_one_that_was_given_them(
    start: LettersPolicy, checkpoints: list[str], tmp_path: Path
) -> None:
    run(tmp_path, start, [], rounds=1)
    with pytest.raises(InputError, match="holds the trajectory of another run"):
        run(tmp_path, start, checkpoints)


def test_a_missing_folder_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"start_from: no folder .*gone; check the path"):
        TrajectorySnapshot([str(tmp_path / "gone")])
