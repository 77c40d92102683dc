"""``tpmm pairs``: a part of a round's completions, sampled and judged by a job of its own."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from tpmm_pl.callbacks import MixedPairs, OnPolicyPairs, ReferenceMerge, RoundCallback, RoundContext
from tpmm_pl.commands.mistakes import sentence
from tpmm_pl.commands.output import report
from tpmm_pl.commands.train import RunCLI
from tpmm_pl.fabric import fabric_like
from tpmm_pl.rollouts.shards import Shard
from tpmm_pl.rounds import run_seed
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

_NEEDED = ("seed_everything", "trainer", "model", "data", "reference", "pairs")
_ALONE = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "max_epochs": 1,
    "limit_train_batches": 0,
}
"""Settings of a Trainer that sets everything up on one device and trains nothing."""


def make_pairs(
    run: Path, round: int, shard: str = "1/1", overwrite: bool = False, json: bool = False
) -> None:
    """Sample and judge completions for the training pairs of a run's coming round.

    `tpmm fit` with `--ckpt_path last` takes what it finds and pairs it.

    Args:
        run: Folder of a run whose fit has ended in front of these pairs.
        round: The round that will train on the pairs, from 1.
        shard: Which part of its prompts: `2/8` is the second of eight.
        overwrite: Make the part again if it is there.
        json: Print one JSON object and nothing else.

    Raises:
        InputError: If the folder holds no such run, or the run is not ready for the round.
    """
    part = Shard.parse(shard)
    run = Path(run)
    if round < 1 or not (run / "config.yaml").is_file():
        raise InputError(
            f"there is no round {round} of a run in {run}; give a folder that `tpmm fit` has begun,"
            " and a round from 1"
        )
    store = _ReadTrajectory(run / "trajectory")
    path = part.path(store.folder(round - 1))
    made = f"shard {part} of round {round}"
    if store.record(round - 1).pairs is not None:
        done = f"the pairs of round {round} are made: nothing to do"
    elif path.exists() and not overwrite:
        done = f"{made} is there: {path}"
    else:
        if store.record(round - 1).snapshot is None:
            ready = [record.round + 1 for record in store.rounds if record.snapshot]
            raise InputError(
                f"{run} has no policy that starts round {round}; there are those of {ready}"
            )
        with redirect_stdout(sys.stderr):
            _RunOnceCLI(run, _ShardJob(store, round, part))
        done = f"{made} is made: {path}"
    report(done, {"out": str(path), "round": round, "shard": str(part)}, json=json)


class _ReadTrajectory(TrajectoryStore):
    """A trajectory whose manifest belongs to another job."""

    def _write(self) -> None:
        """Leave the manifest as it is."""


class _ShardJob(Callback):
    """Makes a shard when everything is set up as in a fit."""

    def __init__(self, store: TrajectoryStore, round_index: int, shard: Shard) -> None:
        self.store = store
        self.round_index = round_index
        self.shard = shard
        self.callbacks: list[RoundCallback] = []
        """Of the run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the round's policy into the module, sample and judge."""
        makers = [c for c in self.callbacks if isinstance(c, OnPolicyPairs | MixedPairs)]
        if not makers or self.round_index > getattr(pl_module, "rounds", self.round_index):
            raise InputError(
                f"the run samples no pairs for a round {self.round_index}: see `pairs` and"
                " `model.init_args.rounds` in its config.yaml"
            )
        context = RoundContext(
            policy=pl_module.policy,  # type: ignore[arg-type]
            store=self.store,
            round_index=self.round_index - 1,
            seed=run_seed(),
            data=trainer.datamodule,  # type: ignore[attr-defined]
            fabric=fabric_like(trainer),
        )
        context.policy.eval()
        context.forget()
        for merge in (c for c in self.callbacks if isinstance(c, ReferenceMerge)):
            if self.store.record(context.round_index).recipe is None:
                raise InputError(
                    f"the run has no reference for round {self.round_index} yet; go on with"
                    " `tpmm fit` first"
                )
            merge.set_next_policy(context)
        context.put_back()
        makers[0].make_shard(context, self.round_index, self.shard)


class _RunOnceCLI(RunCLI):
    """The parts of a run on one device, in a fit whose only callback is the job."""

    def __init__(self, run: Path, job: _ShardJob) -> None:
        self._job = job
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        config = {name: config[name] for name in _NEEDED if config.get(name) is not None}
        config["trainer"] = {**config["trainer"], **_ALONE, "default_root_dir": str(run)}
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
                args={"subcommand": "fit", "fit": config},
            )
        except ArgumentError as error:
            raise InputError(f"{run / 'config.yaml'}: {sentence(str(error))}") from error

    def before_instantiate_classes(self) -> None:
        """Leave the folder alone: it is the fit's."""

    def before_fit(self) -> None:
        """Leave the folder alone."""

    def after_fit(self) -> None:
        """Leave the folder alone."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        named = [self._get(self.config_init, name) for name in ("reference", "pairs")]
        given = [*(config["callbacks"] or []), *named]
        self._job.callbacks = [one for one in given if isinstance(one, RoundCallback)]
        return Trainer(**{**config, "callbacks": [self._job]})

    def _run_subcommand(self, subcommand: str) -> None:
        self.trainer.fit(self.model, datamodule=self.datamodule)
