"""A run that is killed and resumed ends at the unbroken run's snapshots, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from tpmm_pl.callbacks import (
    OnPolicyPairs,
    ReferenceMerge,
    RoundCallback,
    RoundCheckpoint,
    RoundContext,
    RoundEvaluation,
    TrajectorySnapshot,
)
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT, AtomicCheckpointIO
from tpmm_pl.callbacks.round_context import Stage
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.noise import LabelNoise
from tpmm_pl.toy.judges import LettersGold, LettersProxy
from tpmm_pl.toy.module import LettersData
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore

ROUNDS = 3
FUSION = FusionSettings(steps=4, batch_size=8)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own handling may run on it."""


class KillAtStage(RoundCallback):
    """Ends the process in front of a stage of one round's end."""

    def __init__(self, stage: str, round_index: int) -> None:
        super().__init__()
        self.stage, self.round_index = stage, round_index

    def stages(self) -> dict[str, Stage]:
        return {self.stage: self.kill}

    def kill(self, context: RoundContext) -> None:
        if context.round_index == self.round_index:
            raise Killed


class KillAtBatch(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.num_training_batches - 1
        wanted = last if self.batch < 0 else self.batch
        if trainer.current_epoch == self.epoch and batch_idx == wanted:
            raise Killed


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LettersPolicy:
    cache = tmp_path_factory.mktemp("start")
    policy = LettersPolicy(
        hidden=16, layers=2, heads=2, ffn=32, steps=30, batch_size=16, cache_dir=cache
    )
    policy.prepare()
    return policy


def fit(
    root: Path,
    start: LettersPolicy,
    *,
    rounds: int = ROUNDS,
    resume: bool = False,
    extra: tuple[list[Callback], list[Callback]] = ([], []),
    evaluate: bool = False,
) -> Trainer:
    seed_everything(3, verbose=False)
    module = DPOModule(
        start,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        rounds=rounds,
        schedule="cosine",
    )
    data = LettersData(
        batch_size=8,
        prompts_per_round=16,
        start_fuse_prompts=8,
        fuse_prompts_per_round=8,
        evaluation_prompts=4,
    )
    pairs = OnPolicyPairs(
        LettersProxy(),
        method="adjacent",
        samples=4,
        max_new_tokens=6,
        noise=LabelNoise(temperature=0.1, flip=0.2),
    )
    callbacks: list[Callback] = [
        *extra[0],
        TrajectorySnapshot(),
        ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=4),
        pairs,
        *([RoundEvaluation(LettersGold(), LettersProxy(), max_new_tokens=6)] if evaluate else []),
        RoundCheckpoint(every_n_steps=2),
        *extra[1],
    ]
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=rounds,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        plugins=[AtomicCheckpointIO()],
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    checkpoint = root / CHECKPOINT
    path = checkpoint if resume and checkpoint.exists() else None
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True if path else None)
    return trainer


@pytest.fixture(scope="module")
def unbroken(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    root = tmp_path_factory.mktemp("unbroken")
    fit(root, start)
    return TrajectoryStore(root / "trajectory")


def assert_same_trajectory(root: Path, unbroken: TrajectoryStore) -> None:
    store = TrajectoryStore(root / "trajectory")
    assert [record.sha256 for record in store.rounds] == [r.sha256 for r in unbroken.rounds]
    assert [record.recipe for record in store.rounds] == [r.recipe for r in unbroken.rounds]
    for record in store.rounds:
        for name, tensor in store.source(record.round).items():
            assert torch.equal(tensor, unbroken.source(record.round)[name])


# callbacks in front of the others, and behind them
KILLS: dict[str, Callable[[], tuple[list[Callback], list[Callback]]]] = {
    "inside_a_round": lambda: ([], [KillAtBatch(1, 2)]),
    "at_the_last_batch": lambda: ([], [KillAtBatch(1, -1)]),
    "before_the_snapshot": lambda: ([KillAtStage("snapshot", 2)], []),
    "between_snapshot_and_fusion": lambda: ([KillAtStage("fuse", 2)], []),
    "before_the_next_policy": lambda: ([KillAtStage("next_policy", 1)], []),
    "before_the_pairs": lambda: ([KillAtStage("pairs", 2)], []),
    "before_the_closing_checkpoint": lambda: ([KillAtStage("checkpoint", 2)], []),
    "between_rounds": lambda: ([], [KillAtStage("checkpoint", 2)]),
    "in_round_0": lambda: ([KillAtStage("fuse", 0)], []),
    "in_the_last_round_end": lambda: ([KillAtStage("ship", ROUNDS)], []),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_resumes_to_the_same_weights(
    kill: str, start: LettersPolicy, unbroken: TrajectoryStore, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, start, extra=KILLS[kill]())
    fit(tmp_path, start, resume=True)
    assert_same_trajectory(tmp_path, unbroken)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("round_index", [1, 2])
def test_a_run_killed_behind_a_last_batch_and_in_the_next_round_resumes_to_the_same_weights(
    round_index: int, batch: int, start: LettersPolicy, unbroken: TrajectoryStore, tmp_path: Path
) -> None:
    with pytest.raises(Killed):  # the newest checkpoint is of the round's last batch
        fit(tmp_path, start, extra=([KillAtStage("protect", round_index)], []))
    with pytest.raises(Killed):
        fit(tmp_path, start, resume=True, extra=([], [KillAtBatch(round_index, batch)]))
    fit(tmp_path, start, resume=True)
    assert_same_trajectory(tmp_path, unbroken)


def test_a_run_killed_behind_a_last_batch_and_in_the_next_rounds_end_resumes_to_the_same_weights(
    start: LettersPolicy, unbroken: TrajectoryStore, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, start, extra=([KillAtStage("protect", 1)], []))
    with pytest.raises(Killed):
        fit(tmp_path, start, resume=True, extra=([], [KillAtStage("fuse", 2)]))
    fit(tmp_path, start, resume=True)
    assert_same_trajectory(tmp_path, unbroken)


def test_a_finished_run_goes_on_when_rounds_are_raised(
    start: LettersPolicy, unbroken: TrajectoryStore, tmp_path: Path
) -> None:
    fit(tmp_path, start, rounds=ROUNDS - 1)
    fit(tmp_path, start, rounds=ROUNDS, resume=True)
    assert_same_trajectory(tmp_path, unbroken)


def test_evaluation_does_not_change_the_run(
    start: LettersPolicy, unbroken: TrajectoryStore, tmp_path: Path
) -> None:
    fit(tmp_path, start, evaluate=True)
    assert_same_trajectory(tmp_path, unbroken)
