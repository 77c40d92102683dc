"""Snapshots of the policy at every round's end."""

from __future__ import annotations

from tpmm_pl.callbacks.round_end import RoundCallback, RoundContext, Stage
from tpmm_pl.models.weights import save_policy


class TrajectorySnapshot(RoundCallback):
    """Writes the policy as snapshot t after round t, and as snapshot 0 before the first round.

    Works with any module that has a ``policy``. The trajectory is in ``trajectory/`` below the
    trainer's ``default_root_dir``; adapters are written in the form that ``peft`` loads.
    """

    def stages(self) -> dict[str, Stage]:
        """Return the stage that writes the snapshot."""
        return {"snapshot": self.snapshot}

    def snapshot(self, context: RoundContext) -> None:
        """Write the policy's weights and take down what the starting policy is."""
        source = getattr(context.receiver, "policy_source", None)
        if context.round_index == 0 and source is not None:
            context.store.describe_model(source.describe())
        save_policy(context.policy, context.store, context.round_index)
