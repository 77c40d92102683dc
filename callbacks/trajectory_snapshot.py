"""Snapshots of the policy at every round's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from tpmm_pl.callbacks.model_export import KL_TO_START, ModelExport, best_round
from tpmm_pl.callbacks.reference_merge import ReferenceMerge
from tpmm_pl.callbacks.round_context import RoundContext, Stage
from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.models.checkpoints import load_checkpoint
from tpmm_pl.models.weights import save_policy
from tpmm_pl.trajectory import GIVEN
from tpmm_pl.types import InputError


class TrajectorySnapshot(RoundCallback):
    """Writes the policy as snapshot t after round t, and as snapshot 0 before the first round.

    Works with any module that has a ``policy``. The trajectory is in ``trajectory/`` below the
    trainer's ``default_root_dir``; adapters are written in the form that ``peft`` loads.

    Args:
        start_from: Checkpoint folders of any trainer, oldest first, all trained from the starting
            policy: Hugging Face models, or adapters for a policy with adapters. They are rounds
            1 to k, and training goes on from the newest with round k + 1; the module's ``rounds``
            counts them too.
        keep_last: How many of the newest snapshots are kept on disk; ``None``: all. The start and
            the best round are kept too. A learned merge then runs over those that are kept.
        keep_best: KL to the start, in nats a sequence, up to which a round may be the best one:
            the last such round, as in :class:`ModelExport`. Of use with ``keep_last`` only.

    Raises:
        InputError: If a folder is not there, or nothing would be kept.
    """

    def __init__(
        self,
        start_from: Sequence[str] | str = (),
        keep_last: int | None = None,
        keep_best: float = 5.0,
    ) -> None:
        super().__init__()
        if keep_last is not None and keep_last < 1:
            raise InputError(f"snapshot.keep_last is {keep_last}; it must be at least 1")
        self.keep_last = keep_last
        self.keep_best = keep_best
        folders = [start_from] if isinstance(start_from, str) else start_from
        self.start_from = [Path(folder).expanduser() for folder in folders]
        self.given_rounds = len(self.start_from)
        for folder in self.start_from:
            if not folder.is_dir():
                raise InputError(f"snapshot.start_from: no folder {folder}; check the path")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what needs snapshots that are not kept, and weights in pieces, before any round.

        Raises:
            InputError: Naming the settings that do not go together.
        """
        flat = isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy)
        if flat and trainer.world_size > 1:
            raise InputError(
                f"snapshots need whole tensors, and {type(trainer.strategy).__name__} may hold flat"
                " pieces of them; use configs/overlays/fsdp2.yaml, or ddp.yaml"
            )
        if self.keep_last is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if (needed := self._not_kept(callback, self.keep_last)) is not None:
                    raise InputError(f"snapshot.keep_last is {self.keep_last}, but {needed}")

    def stages(self) -> dict[str, Stage]:
        """Return the stages that write the snapshot and delete those that are not kept."""
        return {"snapshot": self.snapshot, "retain": self.retain}

    def snapshot(self, context: RoundContext) -> None:
        """Write the policy's weights and take down what the starting policy is."""
        index = context.round_index
        source = getattr(context.receiver, "policy_source", None)
        if index == 0 and source is not None:
            context.store.describe_model(source.describe())
        if 0 < index <= self.given_rounds:
            folder = self.start_from[index - 1]
            load_checkpoint(context.policy, folder)
            context.store.update(index, notes={GIVEN: f"given: {folder}"})
        save_policy(context.policy, context.store, index)
        if self.keep_last is not None:
            # before coefficients are learned: no merge in use may name what is to be deleted
            self._drop(context, self.keep_last)

    def retain(self, context: RoundContext) -> None:
        """Delete the snapshots that were dropped, when no checkpoint goes back before that."""
        context.store.delete_dropped()

    def _drop(self, context: RoundContext, keep_last: int) -> None:
        store, index = context.store, context.round_index
        earlier = [store.record(kept) for kept in store.kept(index - 1)]
        newest = range(index + 1 - keep_last, index + 1)
        measured = [record for record in earlier if KL_TO_START in record.metrics]
        kept = {0, *newest, best_round(measured, self.keep_best)}
        for record in earlier:
            if record.round not in kept:
                store.drop_snapshot(record.round)

    def _not_kept(self, callback: Callback, keep_last: int) -> str | None:
        if isinstance(callback, ModelExport) and callback.best_kl != self.keep_best:
            return (
                f"export.best_kl {callback.best_kl} and snapshot.keep_best {self.keep_best} would"
                " choose other rounds; set both to the same"
            )
        if not isinstance(callback, ReferenceMerge):
            return None
        if callback.strategy in ("uniform", "ema"):
            return (
                f"reference.strategy {callback.strategy} merges the snapshots of all rounds; leave"
                " keep_last out, or choose window or learned"
            )
        if callback.strategy == "window" and callback.window > keep_last:
            return f"reference.window is {callback.window}; raise keep_last to that"
        if callback.ship == "average":
            return (
                "reference.ship average merges the snapshots of all rounds; leave keep_last out,"
                " or ship merge or learned"
            )
        return None
