from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.letters_run import FUSION, context_of, fit, letters_pairs
from tpmm_pl.callbacks import ReferenceMerge, RoundCheckpoint, TrajectorySnapshot
from tpmm_pl.callbacks.round_checkpoint import AtomicCheckpointIO
from tpmm_pl.toy.start import LettersPolicy


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


def test_nothing_is_written_before_the_first_round(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, trainer=object())
    RoundCheckpoint().save(context)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(checkpoint: Any, beside: Path) -> None:
        beside.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
