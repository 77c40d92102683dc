"""The end of a round: stages in one order, each complete or absent on disk.

Every callback of this package contributes stages. The first of them in a trainer calls
:func:`finish_round`; what the manifest records as complete is not done again, so a run that was
killed anywhere goes on with the stage that was cut off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Adamax, RAdam, RMSprop

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.stop_signals import stop_between_stages
from tpmm_pl.fabric import fabric_like
from tpmm_pl.rounds import RoundSchedule, run_seed
from tpmm_pl.trajectory import GIVEN, TrajectoryStore
from tpmm_pl.types import HasPolicy, HasReference, InputError

STAGES = (
    "protect",
    "snapshot",
    "fuse_pairs",
    "fuse",
    "evaluate",
    "ship",
    "evaluate_ship",
    "export",
    "next_policy",
    "pairs",
    "checkpoint",
    "retain",
)
"""The order. ``protect`` and ``checkpoint`` are the two checkpoints around the rest."""

_IN_MEMORY = frozenset({"protect", "next_policy", "checkpoint", "retain"})
_ONLY_LAST = frozenset({"ship", "evaluate_ship", "export"})
_ONLY_BETWEEN = frozenset({"next_policy", "pairs", "checkpoint", "retain"})


def finish_round(callbacks: Sequence[RoundCallback], context: RoundContext) -> None:
    """Run the stages of a round's end that are not complete, in their one order.

    Args:
        callbacks: Whose stages; a stage of several callbacks runs in their order.
        context: The round. ``policy`` holds the trained weights of the round when its snapshot is
            not on disk yet, and the weights to train next when this returns.
    """
    for callback in callbacks:
        callback.check_policy(context.policy)
    training = context.policy.training
    context.policy.eval()
    left_out = _ONLY_BETWEEN if context.final else _ONLY_LAST
    if context.given_next:
        left_out |= _ONLY_BETWEEN
    for name in _due(callbacks, context.store, context.round_index, left_out):
        if name != "protect":  # the checkpoint that a stopped run goes on from
            stop_between_stages()
        if name == "checkpoint":
            _settle(callbacks, context)
        started = time.perf_counter()
        for callback in callbacks:
            if name in callback.stages():
                callback.stages()[name](context)
        processes.wait()  # what the first process has written is there for all
        if name not in _IN_MEMORY:
            seconds = round(time.perf_counter() - started, 3)
            context.store.update(context.round_index, seconds={name: seconds})
    _settle(callbacks, context)
    context.policy.train(training)


def _due(
    callbacks: Sequence[RoundCallback],
    store: TrajectoryStore,
    round_index: int,
    left_out: frozenset[str],
) -> list[str]:
    wanted = {name for callback in callbacks for name in callback.stages()} - left_out
    complete = set(store.record(round_index).seconds) - _IN_MEMORY
    return [name for name in STAGES if name in wanted - complete]


def _settle(callbacks: Sequence[RoundCallback], context: RoundContext) -> None:
    context.put_back()
    if isinstance(context.receiver, HasReference):
        recipe = context.store.record(context.round_index).recipe
        context.receiver.use_reference(recipe, context.store)
    if not context.final:
        # the last round stays open, so that a run extended by more rounds goes on from it
        for callback in callbacks:
            callback.finished_rounds = context.round_index


class RoundCallback(Callback):
    """A callback with stages of a round's end; the first one in a trainer runs them all.

    A round is ``epochs_per_round`` epochs of the module (1 where it has no such attribute).
    """

    def __init__(self) -> None:
        self.given_rounds = 0
        self.finished_rounds = -1
        self.store: TrajectoryStore | None = None
        self._training_seconds = 0.0
        self._epoch_started: float | None = None

    def stages(self) -> dict[str, Stage]:
        """Return what this callback contributes, by the names of ``STAGES``."""
        return {}

    def check_policy(self, policy: nn.Module) -> None:
        """Refuse a policy that the settings do not fit, before any stage has run.

        Raises:
            InputError: Naming the way out.
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make record 0 and the first pairs; a resumed fit only checks the manifest."""
        if not self._leads(trainer):
            return
        store = _store(trainer)
        if trainer.ckpt_path is not None:
            if not store.rounds:
                raise InputError(f"the checkpoint {trainer.ckpt_path} has no {store.manifest}")
            return
        given = max(callback.given_rounds for callback in _round_callbacks(trainer))
        if any(r.round > given or (r.round > 0 and GIVEN not in r.notes) for r in store.rounds):
            if not trainer.strategy.restore_checkpoint_after_setup:
                raise _of_another_run(store)
            return  # sharded weights are restored later, and until then no path is known
        store.verify(closed=-1)
        _begin_after(trainer, pl_module, given)
        for index in range(given + 1):
            self._finish(trainer, pl_module, index, given=given)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On a resume, forget what the checkpoint has not reached and finish what it has."""
        if not self._leads(trainer):
            return
        rounds = _schedule(pl_module).finished(trainer.current_epoch)
        if trainer.ckpt_path is None and any(r.round > rounds for r in _store(trainer).rounds):
            raise _of_another_run(_store(trainer))
        if trainer.ckpt_path is not None:
            _begin_epoch(trainer)
            _store(trainer).forget_after(rounds)
            _store(trainer).verify(closed=self.finished_rounds)
            if rounds > self.finished_rounds:
                self._finish(trainer, pl_module, rounds)
            elif isinstance(pl_module, HasReference):
                store = _store(trainer)
                pl_module.use_reference(store.record(rounds).recipe, store)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time of training."""
        self._epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the round after its last epoch."""
        if self._epoch_started is not None:
            self._training_seconds += time.perf_counter() - self._epoch_started
        schedule = _schedule(pl_module)
        epochs = trainer.current_epoch + 1
        if self._leads(trainer) and epochs % schedule.epochs_per_round == 0:
            self._finish(trainer, pl_module, schedule.finished(epochs))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the last round where a resumed fit had nothing left to train."""
        rounds = _schedule(pl_module).finished(trainer.current_epoch)
        done = trainer.max_epochs is not None and trainer.current_epoch >= trainer.max_epochs
        callbacks = _round_callbacks(trainer)
        disk_stages = set(_due(callbacks, _store(trainer), rounds, _ONLY_BETWEEN)) - _IN_MEMORY
        if self._leads(trainer) and done and disk_stages:
            _store(trainer).verify(closed=self.finished_rounds)
            self._finish(trainer, pl_module, rounds)

    def state_dict(self) -> dict[str, Any]:
        """Return how many rounds the checkpoint has finished."""
        return {"finished_rounds": self.finished_rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how many rounds the checkpoint has finished."""
        self.finished_rounds = state_dict["finished_rounds"]

    def _leads(self, trainer: Trainer) -> bool:
        return self is _round_callbacks(trainer)[0]

    def _finish(
        self, trainer: Trainer, pl_module: LightningModule, rounds: int, given: int = 0
    ) -> None:
        if not isinstance(pl_module, HasPolicy):
            raise InputError(f"{type(pl_module).__name__} has no attribute `policy` to snapshot")
        last = _schedule(pl_module).finished(trainer.max_epochs or 0)

        def log(metrics: Mapping[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(metrics), step=trainer.global_step)

        context = RoundContext(
            policy=pl_module.policy,
            store=_store(trainer),
            round_index=rounds,
            final=rounds >= last,
            given_next=rounds < given,
            seed=run_seed(),
            data=trainer.datamodule,  # type: ignore[attr-defined]
            receiver=pl_module,
            fabric=fabric_like(trainer),
            optimizers=trainer.optimizers,
            # nothing is trained yet that a checkpoint could keep
            trainer=None if rounds <= given else trainer,
            log=log,
        )
        if 0 < rounds <= given:
            # the module holds another round's weights
            context.forget()
        finish_round(_round_callbacks(trainer), context)
        if self._training_seconds:
            context.store.update(rounds, seconds={"train": round(self._training_seconds, 3)})
        self._training_seconds = 0.0


def _begin_after(trainer: Trainer, pl_module: LightningModule, given: int) -> None:
    """Count the epochs of rounds that were given as done, so that training begins after them."""
    if not given:
        return
    epochs = given * _schedule(pl_module).epochs_per_round
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        raise InputError(
            f"snapshot.start_from gives {given} rounds, so rounds must be at least {given + 1}: it"
            " counts them too"
        )
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = epochs


_BEGIN_AT_ZERO = (Adam, Adamax, RAdam, RMSprop, Adadelta, SGD)
"""Optimizers whose state is all zeros before the first step; AdamW is an Adam."""


def _begin_epoch(trainer: Trainer) -> None:
    """Count as the Trainer does before an epoch, where it has resumed between two.

    From a checkpoint of an epoch's last batch or of its end it goes on with counts that lag, and
    writes them into the checkpoints of the next epoch: resumed from one of those, it would train on
    batches again.
    """
    loop: Any = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    if batches.current.ready and not batches.is_last_batch:
        return  # in the middle of an epoch
    for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
        counts.ready = counts.started = counts.processed = counts.completed = trainer.current_epoch
    batches.total.completed = batches.total.processed
    batches.reset_on_run()
    loop.restarting = False
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()


def _of_another_run(store: TrajectoryStore) -> InputError:
    return InputError(
        f"{store.root} holds the trajectory of another run; resume that run from its "
        "checkpoint or choose another folder"
    )


def reset_optimizer(optimizer: torch.optim.Optimizer, *, in_place: bool = False) -> None:
    """Forget what an optimizer has accumulated, as if it had never stepped.

    Args:
        optimizer: What to reset.
        in_place: Fill its state with zeros, as checkpoints of a sharded model need it: where there
            is no state they take a step to make it, and that step counts.

    Raises:
        InputError: If it is to be filled, and may not begin at zero.
    """
    if not in_place:
        optimizer.state.clear()
        return
    if not isinstance(optimizer, _BEGIN_AT_ZERO):
        names = ", ".join(kind.__name__ for kind in _BEGIN_AT_ZERO)
        raise InputError(
            f"{type(optimizer).__name__} cannot start afresh on sharded weights after a round; use"
            f" one of {names}, or the strategy ddp"
        )
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def _round_callbacks(trainer: Trainer) -> list[RoundCallback]:
    return [c for c in trainer.callbacks if isinstance(c, RoundCallback)]  # type: ignore[attr-defined]


def _schedule(pl_module: LightningModule) -> RoundSchedule:
    return RoundSchedule(getattr(pl_module, "epochs_per_round", 1))


def _store(trainer: Trainer) -> TrajectoryStore:
    leader = _round_callbacks(trainer)[0]
    root = Path(trainer.default_root_dir) / "trajectory"
    if leader.store is None or leader.store.root != root:
        leader.store = TrajectoryStore(root)
    return leader.store
