"""SIGTERM and SIGUSR1 end a fit between two batches or between two stages of a round's end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tpmm_pl import processes

EXIT_CODE = 143
"""Of a process that a signal has ended: 128 + SIGTERM."""

_SIGNALS = ("SIGTERM", "SIGUSR1")  # the second is not known on Windows


class StoppedBetweenStagesError(SIGTERMException):
    """The module may hold a merge: the checkpoint before the stages is the one to go on from."""


class _Asked:
    """Whether a signal has come; signals are the process's, and so is this."""

    fitting = False
    stop = False


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Take SIGTERM and SIGUSR1 inside the block, in the main thread.

    Within a fit with :class:`StopSignals` a signal is only noted, so that none, be it the second,
    cuts off what is being written. Before and after the fit it ends the process at once.
    """
    _Asked.fitting = _Asked.stop = False
    handlers = _listen()
    try:
        yield
    finally:
        _Asked.fitting = False
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopSignals(Callback):
    """Ends the fit after the batch in which any of its processes has got a signal.

    For use inside :func:`stopping_on_signals`. It takes the place of Lightning's handlers: that of
    SIGTERM sends messages between processes wherever they are, and SLURM's ``auto_requeue`` writes
    checkpoints of other names, which a run folder does not know.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _Asked.fitting = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _listen()  # Lightning's handlers have come just before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if processes.count() > 1 and batch_idx % every and not trainer.is_last_batch:
            return  # asking each other waits for the device
        if _asked_anywhere():
            # Lightning acts on it when all hooks of the batch, or of the epoch's end, have run
            trainer._signal_connector.received_sigterm = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _Asked.fitting = False


def stop_between_stages() -> None:
    """End the fit if any process has got a signal; all processes call it.

    Raises:
        StoppedBetweenStagesError: If one has.
    """
    if _asked_anywhere():
        raise StoppedBetweenStagesError


def _asked_anywhere() -> bool:
    return bool(processes.mean(torch.tensor(float(_Asked.stop))) > 0)


def _listen() -> dict[signal.Signals, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [signal.Signals[name] for name in _SIGNALS if name in signal.Signals.__members__]
    return {number: signal.signal(number, _on_signal) for number in numbers}


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _Asked.fitting:
        raise SystemExit(EXIT_CODE)
    _Asked.stop = True
