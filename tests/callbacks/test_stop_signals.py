"""What one process learns, by a signal or from its pairs, ends all of them at the same batch."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.two_processes import exit_codes, fit
from tpmm_pl import processes
from tpmm_pl.callbacks import RoundCallback, RoundContext
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.callbacks.round_context import Stage
from tpmm_pl.callbacks.stop_signals import EXIT_CODE, StopSignals, stopping_on_signals
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import RunError


class SignalsTheSecond(Callback):
    """In the second batch of the second epoch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            self.act(batch)

    def act(self, batch: Any) -> None:
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalsInAStage(RoundCallback):
    def stages(self) -> dict[str, Stage]:
        return {"snapshot": self.act}

    def act(self, context: RoundContext) -> None:
        if context.round_index == 1 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


class BreaksTheSecond(SignalsTheSecond):
    def act(self, batch: Any) -> None:
        if processes.rank() == 1:
            batch[0].reference.chosen[0] = torch.inf


def fit_in_two(root: Path, stops: type[Callback]) -> None:
    try:
        with stopping_on_signals():
            fit(root, strategy="ddp", processes=2, callbacks=[StopSignals(), stops()])
    except SIGTERMException:
        sys.exit(EXIT_CODE)
    except RunError as error:
        (root / f"error_{processes.rank()}").write_text(str(error))
        sys.exit(1)


def test_a_signal_to_one_process_ends_both_behind_the_same_batch(tmp_path: Path) -> None:
    assert exit_codes(partial(fit_in_two, tmp_path, SignalsTheSecond)) == [EXIT_CODE] * 2
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 2


def test_a_signal_to_one_process_in_a_stage_ends_both_behind_it(tmp_path: Path) -> None:
    assert exit_codes(partial(fit_in_two, tmp_path, SignalsInAStage)) == [EXIT_CODE] * 2
    records = TrajectoryStore(tmp_path / "trajectory").rounds
    assert list(records[-1].seconds) == ["snapshot"]
    assert records[-1].round == 1


def test_a_broken_loss_in_one_process_ends_both(tmp_path: Path) -> None:
    assert exit_codes(partial(fit_in_two, tmp_path, BreaksTheSecond)) == [1, 1]
    first, second = ((tmp_path / f"error_{rank}").read_text() for rank in range(2))
    where = "not finite in optimizer step 4, batch 1 of epoch 1, round 2"
    assert first.startswith(f"the gradient is {where}")
    assert second.startswith("the loss of 1 pair, row ")
    assert where in second


def test_outside_of_a_fit_a_signal_ends_the_process_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended, stopping_on_signals():
        signal.raise_signal(signal.SIGUSR1)
    assert ended.value.code == EXIT_CODE
    assert not isinstance(ended.value, SIGTERMException)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
