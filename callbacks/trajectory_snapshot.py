"""Snapshots of the policy at every round's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

    Raises:
        InputError: If a folder is not there.
    """

    def __init__(self, start_from: Sequence[str] | str = ()) -> None:
        super().__init__()
        folders = [start_from] if isinstance(start_from, str) else start_from
        self.start_from = [Path(folder).expanduser() for folder in folders]
        self.given_rounds = len(self.start_from)
        for folder in self.start_from:
            if not folder.is_dir():
                raise InputError(f"snapshot.start_from: no folder {folder}; check the path")

    def stages(self) -> dict[str, Stage]:
        """Return the stage that writes the snapshot."""
        return {"snapshot": self.snapshot}

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
