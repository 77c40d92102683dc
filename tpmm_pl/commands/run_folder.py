"""A run folder in use: whether to start, go on, or leave it alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.files import write_text
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

_FREE = (
    "model.init_args.rounds",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.profiler",
)
"""Settings that may change without making another run of it."""
_FREE_WHEN_UNFINISHED = ("pairs.", "trainer.accelerator", "trainer.devices")
"""Also these when a run goes on: after a round that had no pairs, or on another machine."""

_CONTENTS = ("trajectory", "checkpoints", "tensorboard", "figures", "export")
_FILES = ("config.yaml", "data_report.json", "finished.json", "recipe.json", "run.log")


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
        self._mark = root / "finished.json"
        self._replaced = root / ".replaced"

    def check(self, config: dict[str, Any], *, ckpt_path: str | None, rounds: int | None) -> None:
        """Refuse a fit that would spoil the run in the folder.

        Args:
            config: The whole configuration as plain values.
            ckpt_path: As given by the user; ``last`` goes on where the run stopped.
            rounds: T, or ``None`` for a fit without rounds.

        Raises:
            InputError: If the folder holds another run, or this one unfinished.
            RunFinishedError: If this run is complete.
        """
        if not self.config.exists() or not self._holds_work():
            return
        finished = self._finished_rounds()
        free = _FREE if finished is not None else (*_FREE, *_FREE_WHEN_UNFINISHED)
        self._refuse_changes(config, free)
        reached = max((r.round for r in self._store().rounds if r.snapshot), default=0)
        if rounds is not None and rounds < reached:
            raise InputError(
                f"{self.root} holds {reached} rounds; model.rounds cannot be lowered to {rounds}. "
                "Choose another trainer.default_root_dir, or start over with --overwrite"
            )
        if finished is not None and finished >= (rounds or 0):
            longer = "" if rounds is None else "raise model.rounds with --ckpt_path last, or "
            raise RunFinishedError(
                f"{self.root} holds this run, finished: nothing to do. To go on, {longer}"
                "start over with --overwrite"
            )
        if ckpt_path is None and (rounds is not None or self.checkpoint.exists()):
            raise InputError(
                f"{self.root} holds an unfinished run; go on with --ckpt_path last, or start "
                "over with --overwrite"
            )

    def begin(self, config: dict[str, Any], *, overwrite: bool) -> None:
        """Write the config; with ``overwrite`` set what is there aside until :meth:`end`."""
        if overwrite and self.root.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._move(self.root, self._replaced)
        write_text(self.config, yaml.safe_dump(config, sort_keys=False))
        handler = logging.FileHandler(self.root / "run.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("lightning.pytorch", "tpmm_pl"):
            logging.getLogger(name).addHandler(handler)

    def restore(self) -> None:
        """Bring back what was set aside, if the new run has made nothing."""
        if self._replaced.exists() and not self._holds_work():
            self._move(self._replaced, self.root)
            shutil.rmtree(self._replaced)

    def end(self, rounds: int | None) -> None:
        """Mark the run as finished, and delete what it replaced."""
        write_text(self._mark, json.dumps({"rounds": rounds or 0}) + "\n")
        shutil.rmtree(self._replaced, ignore_errors=True)

    def resume_from(self, ckpt_path: str | None) -> str | None:
        """Return the checkpoint to resume from; ``last`` in an empty folder starts."""
        if ckpt_path == "last":
            return str(self.checkpoint) if self.checkpoint.exists() else None
        return ckpt_path

    def _finished_rounds(self) -> int | None:
        if not self._mark.exists():
            return None
        rounds: int = json.loads(self._mark.read_text(encoding="utf-8"))["rounds"]
        return rounds

    def _holds_work(self) -> bool:
        # a config alone is of a run that ended on bad input before it made anything
        made = (self.root / "trajectory", self.checkpoint, self._mark)
        return any(path.exists() for path in made)

    def _store(self) -> TrajectoryStore:
        return TrajectoryStore(self.root / "trajectory")

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

    @staticmethod
    def _move(source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name in _CONTENTS:
            shutil.rmtree(target / name, ignore_errors=True)
        for name in (*_CONTENTS, *_FILES):
            if (source / name).exists():
                (source / name).replace(target / name)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
