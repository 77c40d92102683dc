"""Runs as a report reads them: the configuration, the records, and what is still missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tpmm_pl.trajectory import DROPPED, Record, TrajectoryStore
from tpmm_pl.types import InputError

SEED = "seed_everything"
STRATEGY = "reference.init_args.strategy"

_NOT_THE_METHOD = (
    "ckpt_path",
    "dry_run",
    "overwrite",
    "weights_only",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_epochs",
    "trainer.profiler",
)
"""Settings of places and of what is shown; ``max_epochs`` follows from the rounds."""
_TASK = ("data.class_path", "data.init_args.evaluation", "evaluation.init_args.gold.class_path")
"""Settings that decide what the metrics are about."""
_SECRET = re.compile(r"(^|_)(api_key|auth|password|secret|token)$")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Run:
    """The folder of a run, finished or not."""

    path: Path
    """As the user gave it."""
    store: TrajectoryStore
    config: Mapping[str, Any]
    """What ``config.yaml`` says, without secrets; empty where there is none."""

    @property
    def records(self) -> list[Record]:
        """The rounds, oldest first."""
        return self.store.rounds

    @property
    def seed(self) -> int | None:
        """The seed of everything; ``None`` without a configuration."""
        return self.config.get(SEED)

    @property
    def reached(self) -> int:
        """The last round whose policy there was."""
        return max(record.round for record in self.records if record.sha256)

    @property
    def planned(self) -> int | None:
        """How many rounds the configuration asks for, if it says so."""
        planned: int | None = self.settings.get("model.init_args.rounds")
        return planned

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that make the method what it is, by dotted name; the seed is not among."""
        # a reward model at rewards/seed_3 is the seed's too
        text = re.sub(rf"seed_{self.seed}(?!\d)", "seed_*", json.dumps(self.config))
        return {
            name: value
            for name, value in _flat(json.loads(text)).items()
            if name != SEED and not name.startswith(_NOT_THE_METHOD)
            if not name.endswith(".cache_dir")
        }

    @property
    def identity(self) -> str:
        """What runs have in common that differ only in the seed."""
        return json.dumps(self.settings, sort_keys=True) if self.config else str(self.path)

    @property
    def task(self) -> str | None:
        """What the metrics are about; ``None`` where nobody can say."""
        known = [self.settings.get(name) for name in _TASK]
        kind, *rest = (str(value).rpartition(".")[2] for value in known)
        return None if not self.config else " ".join([kind, *(r for r in rest if r != "None")])

    def metrics(self, round_index: int) -> Mapping[str, float]:
        """Return what was measured after a round."""
        return self.store.record(round_index).metrics

    def scores(self, round_index: int) -> dict[str, dict[str, list[float]]]:
        """Return scores of single answers by domain and judge; empty where none were written."""
        file = self.store.folder(round_index) / "scores.json"
        if not file.is_file():
            return {}
        try:
            found: dict[str, dict[str, list[float]]] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{file} cannot be read ({error}); delete it and report again"
            ) from error
        return found


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs of one task; a folder of runs stands for all runs below it.

    Args:
        paths: Run folders or folders of them; what is named twice is read once.

    Raises:
        InputError: If a folder holds no run, or runs are of different tasks.
    """
    folders = {run.resolve(): run for path in paths for run in _folders(path)}
    runs = [_read(folder) for folder in folders.values()]
    tasks = {run.task: run.path for run in reversed(runs) if run.task is not None}
    if len(tasks) > 1:
        listed = "; ".join(f"{path} is of {task}" for task, path in reversed(tasks.items()))
        raise InputError(f"these runs are of different tasks, report them apart: {listed}")
    return runs


def notes(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know of runs: which are unfinished, what was noted in them."""
    found = [
        f"{run.path} is unfinished: it has {run.reached} of {run.planned} rounds"
        for run in runs
        if run.planned is not None and run.reached < run.planned
    ]
    noted: dict[str, list[str]] = {}
    for run in runs:
        for record in run.records:
            for text in (text for name, text in record.notes.items() if name != DROPPED):
                noted.setdefault(text, []).append(f"{run.path}, round {record.round}")
    for text, (first, *others) in noted.items():
        found.append(f"{first}{f' and {len(others)} more' if others else ''}: {text}")
    return found


def _folders(path: Path) -> list[Path]:
    if (path / "trajectory" / "manifest.json").is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; check the path")
    found = sorted(manifest.parents[1] for manifest in path.rglob("trajectory/manifest.json"))
    # a run that was started over keeps the one it replaced in a hidden folder until it has ended
    shown = [run for run in found if not any(p[0] == "." for p in run.relative_to(path).parts)]
    if not shown:
        raise InputError(
            f"{path} is no run: it has no trajectory/manifest.json, and no folder below it has;"
            " give what trainer.default_root_dir named"
        )
    return shown


def _read(path: Path) -> Run:
    store = TrajectoryStore(path / "trajectory")
    if not any(record.sha256 for record in store.rounds):
        raise InputError(f"{path} has no policy yet; report it when its first round has begun")
    return Run(path, store, _config(path / "config.yaml"))


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no settings by name")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file} cannot be read ({reason}); restore it") from error
    return {name: _without_secrets(name, value) for name, value in content.items()}


def _without_secrets(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(name, inner) for inner in value]
    if isinstance(value, str):
        return "(not shown)" if _SECRET.search(name) else _CREDENTIALS.sub("", value)
    return value


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
