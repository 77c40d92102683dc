from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from tests.callbacks.letters_run import FUSION, context_of, fit, letters_pairs
from tpmm_pl import processes
from tpmm_pl.callbacks import ReferenceMerge, RoundCheckpoint, TrajectorySnapshot
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT, AtomicCheckpointIO
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import RunError


class Saves(RoundCheckpoint):
    """Keeps when each checkpoint was written: round, steps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[tuple[int, int]] = []

    def save(self, context: Any) -> None:
        super().save(context)
        if context.round_index:
            self.seen.append((context.round_index, context.trainer.global_step))


def test_there_is_one_checkpoint_written_around_every_rounds_end(
    start: LettersPolicy, tmp_path: Path
) -> None:
    saves = Saves()
    reference = ReferenceMerge("last", fusion=FUSION, ship_steps=1)
    fit(tmp_path, start, [TrajectorySnapshot(), reference, letters_pairs(), saves])
    steps = [step for _, step in saves.seen]
    # before and after the first round's end; the last stays open for more rounds
    assert [index for index, _ in saves.seen] == [1, 1, 2]
    assert steps[0] == steps[1] < steps[2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps[2]


class Breaks(Callback):
    """Spoils a pair in one batch of the second round, or in none any more."""

    def __init__(self) -> None:
        self.times = 1

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1 and self.times:
            self.times = 0
            batch[0].reference.chosen[0] = torch.inf


def test_a_round_with_a_broken_step_has_no_snapshot_and_trains_again(
    start: LettersPolicy, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        reference = ReferenceMerge("uniform", ship_steps=1)
        return [TrajectorySnapshot(), reference, letters_pairs(), RoundCheckpoint(every_n_steps=1)]

    whole = fit(tmp_path / "whole", start, callbacks())
    root = tmp_path / "broken"
    message = r"the loss of 1 pair, row \d+ \(prompt .*\), is not finite in optimizer step \d+,"
    with pytest.raises(RunError, match=f"{message} batch 1 of epoch 1, round 2; the last good"):
        fit(root, start, [Breaks(), *callbacks()])
    assert [r.round for r in TrajectoryStore(root / "trajectory").rounds] == [0, 1]
    resumed = fit(root, start, callbacks(), ckpt_path=root / "checkpoints" / "last.ckpt")
    assert [r.sha256 for r in resumed.rounds] == [r.sha256 for r in whole.rounds]


def test_nothing_is_written_before_the_first_round(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, trainer=object())
    RoundCheckpoint().save(context)
    assert not (tmp_path / "checkpoints").exists()


def test_no_process_goes_on_before_the_checkpoint_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(folder: Path, weights_only: bool) -> None:
        (folder / "part").write_text("of a process")

    there: list[bool] = []
    monkeypatch.setattr(processes, "wait", lambda: there.append((tmp_path / CHECKPOINT).is_dir()))
    trainer: Any = SimpleNamespace(
        default_root_dir=tmp_path, strategy=ModelParallelStrategy(), save_checkpoint=save
    )
    RoundCheckpoint().write(trainer)
    assert there == [True]


def test_a_checkpoint_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(checkpoint: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
