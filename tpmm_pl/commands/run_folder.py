"""A run folder in use: whether to start, go on, or leave it alone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.files import write_text
from tpmm_pl.modules.fusion import RECIPE
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

_FREE = ("trainer.", "ckpt_path", "overwrite", "config", "model.init_args.rounds")
"""Settings that may change without making another run of it."""
_FREE_WHEN_UNFINISHED = ("pairs.",)
"""Also these when a run goes on, as after a round that had no pairs."""


class RunFinishedError(Exception):
    """The run is complete and its config unchanged: there is nothing to do."""


class RunFolder:
    """The folder of a run, ``trainer.default_root_dir``.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.checkpoint = root / CHECKPOINT

    def begin(
        self, config: dict[str, Any], *, ckpt_path: str | None, overwrite: bool, rounds: int | None
    ) -> str | None:
        """Make the folder ready for a fit and write its config.

        Args:
            config: The whole configuration as plain values.
            ckpt_path: As given by the user; ``last`` goes on where the run stopped.
            overwrite: Whether a run in the folder may be deleted.
            rounds: T, or ``None`` for a fit without rounds.

        Returns:
            The checkpoint to resume from, or ``None`` to start.

        Raises:
            InputError: If the folder holds a run that this command would spoil.
            RunFinishedError: If the same run is complete.
        """
        if overwrite:
            self._delete()
        elif self.config.exists() and self._holds_work():
            finished = self.finished(rounds)
            self._refuse_changes(config, _FREE if finished else (*_FREE, *_FREE_WHEN_UNFINISHED))
            if finished:
                longer = "" if rounds is None else "raise model.rounds with --ckpt_path last, or "
                raise RunFinishedError(
                    f"{self.root} holds this run, finished: nothing to do. To go on, {longer}"
                    "start over with --overwrite"
                )
            if ckpt_path is None and rounds is not None:
                raise InputError(
                    f"{self.root} holds an unfinished run; go on with --ckpt_path last, or start "
                    "over with --overwrite"
                )
        write_text(self.config, yaml.safe_dump(config, sort_keys=False))
        if ckpt_path == "last":
            return str(self.checkpoint) if self.checkpoint.exists() else None
        return ckpt_path

    def finished(self, rounds: int | None) -> bool:
        """Return whether the run has come to its end: round T, or a learned recipe."""
        if rounds is None:
            return (self.root / RECIPE).exists()
        record = TrajectoryStore(self.root / "trajectory").record(rounds)
        return bool({"ship", "export"} & set(record.seconds))

    def log_to_file(self) -> None:
        """Add warnings and messages of the run to ``run.log``."""
        self.root.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.root / "run.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("lightning.pytorch", "tpmm_pl"):
            logging.getLogger(name).addHandler(handler)

    def _holds_work(self) -> bool:
        # a config alone is of a run that ended on bad input before it made anything
        return any((self.root / name).exists() for name in ("trajectory", RECIPE))

    def _refuse_changes(self, config: dict[str, Any], free: tuple[str, ...]) -> None:
        before = _flat(yaml.safe_load(self.config.read_text(encoding="utf-8")) or {})
        now = _flat(config)
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        changed = [key for key in keys if not key.startswith(free)]
        if changed:
            listed = ", ".join(f"{k} ({before.get(k)} -> {now.get(k)})" for k in changed[:8])
            raise InputError(
                f"{self.root} holds a run with another configuration: {listed}; choose another "
                "trainer.default_root_dir, or start over with --overwrite"
            )

    def _delete(self) -> None:
        for name in ("trajectory", "checkpoints", "tensorboard", "figures", "export"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for file in (self.config, self.root / RECIPE):
            file.unlink(missing_ok=True)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
