"""``tpmm fit``: LightningCLI over a run folder."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from tpmm_pl import processes
from tpmm_pl.callbacks.reward_evaluation import RewardEvaluation
from tpmm_pl.callbacks.round_checkpoint import AtomicCheckpointIO, writes_folder
from tpmm_pl.callbacks.stop_signals import StopSignals, stopping_on_signals
from tpmm_pl.commands.dry_run import dry_run
from tpmm_pl.commands.leftovers import remove_leftovers
from tpmm_pl.commands.mistakes import sentence
from tpmm_pl.commands.run_folder import RunFinishedError, RunFolder
from tpmm_pl.data.rewards import RewardPairs
from tpmm_pl.files import causes
from tpmm_pl.modules.fusion import FusionWeights
from tpmm_pl.modules.packed_steps import PackedSteps
from tpmm_pl.report.figures import gold_proxy_figure
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, RunError

CALLBACK_GROUPS = (
    "snapshot",
    "reference",
    "pairs",
    "evaluation",
    "experts",
    "export",
    "checkpoint",
)
"""Named optional callbacks of a config; one flag reaches each: ``--reference.strategy last``."""

_OF_THIS_CALL = ("overwrite", "ckpt_path", "dry_run")
"""Flags that are no part of the run's configuration."""

_STEP_SETTINGS: dict[str, tuple[tuple[object, ...], str]] = {
    "gradient_clip_val": ((None, 0), "set model.gradient_clip_val"),
    "gradient_clip_algorithm": ((None, "norm"), "leave it out: clipping is by norm"),
    "accumulate_grad_batches": (
        (1,),
        "set data.batch_size, the pairs of a step, and data.token_budget, the tokens at once",
    ),
}
"""The Trainer's settings of optimizer steps: values without effect, and what to do instead."""

logger = logging.getLogger("tpmm_pl")


class RunCLI(LightningCLI):
    """LightningCLI whose trainer writes one run folder, ``trainer.default_root_dir``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the one subcommand: the others of Lightning know nothing of a run folder."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the named callbacks, ``--overwrite`` and ``--dry_run``."""
        for name in CALLBACK_GROUPS:
            parser.add_subclass_arguments(Callback, name, required=False)
        parser.add_argument(
            "--overwrite", action="store_true", help="start over in a folder that is in use"
        )
        parser.add_argument(
            "--dry_run", action="store_true", help="print what time, memory and disk it will take"
        )

    def before_instantiate_classes(self) -> None:
        """Refuse a folder in use before anything is loaded."""
        settings = self.config[self.subcommand]
        root = settings.trainer.default_root_dir
        if root is None:
            raise InputError("set trainer.default_root_dir, the folder of the run")
        _refuse_step_settings(settings)
        self._folder = RunFolder(Path(root))
        written = yaml.safe_load(self._parser(self.subcommand).dump(settings, skip_none=False))
        self._written = {k: v for k, v in written.items() if k not in _OF_THIS_CALL}
        self._rounds = self._model_setting("rounds")
        self._follow_rounds(settings.trainer)
        if settings.dry_run:
            # what data modules tell of their rows goes there
            self._scratch = TemporaryDirectory()
            settings.trainer.default_root_dir = self._scratch.name
        elif settings.overwrite:
            self._folder.take()
        else:
            self._folder.check(self._written, ckpt_path=settings.ckpt_path, rounds=self._rounds)

    def before_fit(self) -> None:
        """Make the folder ready and find the checkpoint."""
        settings = self.config_init[self.subcommand]
        self._folder.begin(self._written, overwrite=settings.overwrite)
        rank_zero_only(remove_leftovers)(self._folder.root)
        settings.ckpt_path = self._folder.resume_from(settings.ckpt_path)
        refuse_other_form(settings.ckpt_path, self.trainer.strategy)

    def after_fit(self) -> None:
        """Measure what the last step left, draw the figure of the run, mark it as finished."""
        self._validate_last_step()
        if not self.trainer.is_global_zero:
            return
        store = TrajectoryStore(self._folder.root / "trajectory")
        recipe = store.rounds[-1].recipe if store.rounds else None
        if recipe is not None:
            figure = self._folder.root / "figures" / "gold_proxy.png"
            title = f"{self._folder.root.name}: reference {recipe.strategy}"
            if gold_proxy_figure(store.rounds, figure, title):
                print(f"figure: {figure}")
        self._folder.end(self._rounds)

    def _validate_last_step(self) -> None:
        # a fit that max_steps ends within an epoch has no validation of its own there
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        shown = [c for c in callbacks if isinstance(c, RewardEvaluation)]
        unmeasured = any(c.measured_step < self.trainer.global_step for c in shown)
        data = self.datamodule
        held_out = isinstance(data, RewardPairs) and any(data.eval_pairs.values())
        if unmeasured and held_out and self.trainer.limit_val_batches:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _run_subcommand(self, subcommand: str) -> None:
        settings = self.config_init[subcommand]
        if settings.dry_run:
            with self._scratch:
                if self.trainer.is_global_zero:
                    run = self.trainer, self.model, self.datamodule, self._folder.root
                    print(dry_run(*run, overwrite=settings.overwrite))
            return
        try:
            super()._run_subcommand(subcommand)
        except InputError:
            self._folder.restore()
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        named = [self._get(self.config_init, name) for name in CALLBACK_GROUPS]
        callbacks = [StopSignals(), *callbacks, *(one for one in named if one is not None)]
        if config["logger"] in (None, True):
            root = config["default_root_dir"]
            config["logger"] = TensorBoardLogger(root, name="tensorboard", version="")
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer: Trainer = super()._instantiate_trainer(config, callbacks)
        return trainer

    def _follow_rounds(self, trainer: Any) -> None:
        rounds = self._model_setting("rounds")
        if rounds is None:
            return
        if trainer.max_steps != -1 or trainer.max_epochs is not None:
            raise InputError(
                "trainer.max_steps and trainer.max_epochs follow from model.rounds and "
                "model.epochs_per_round; set those instead"
            )
        trainer.max_epochs = rounds * (self._model_setting("epochs_per_round") or 1)
        trainer.reload_dataloaders_every_n_epochs = 1

    def _model_setting(self, name: str) -> int | None:
        value: int | None = self.config[self.subcommand].model.init_args.get(name)
        return value


def _refuse_step_settings(settings: Any) -> None:
    module, _, name = settings.model.class_path.rpartition(".")
    kind = getattr(import_module(module), name)
    if not issubclass(kind, PackedSteps | FusionWeights):
        return
    for setting, (neutral, instead) in _STEP_SETTINGS.items():
        value = settings.trainer[setting]
        if value not in neutral:
            way_out = instead if issubclass(kind, PackedSteps) else "leave it out"
            raise InputError(
                f"trainer.{setting} is {value}, but {name} takes its optimizer steps itself;"
                f" {way_out}"
            )


def refuse_other_form(checkpoint: str | None, strategy: Strategy) -> None:
    """Refuse a checkpoint in parts for a strategy that wants a whole one, and the reverse.

    Raises:
        InputError: Naming the way out.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return
    in_parts = Path(checkpoint).is_dir()
    if in_parts != writes_folder(strategy):
        form = (
            "in parts, by a sharded strategy" if in_parts else "whole, by one that shards nothing"
        )
        raise InputError(
            f"{checkpoint} was written {form}, and {type(strategy).__name__} cannot go on from it;"
            " resume with the trainer.strategy that the run was begun with"
        )


@stopping_on_signals()
def train() -> None:
    """Run the subcommand in ``sys.argv``.

    Raises:
        InputError: If the configuration or its input is at fault.
        RunError: If the run failed; the traceback is in ``run.log``.
    """
    warnings.showwarning = _show_warning
    # of Lightning's use of torch and of peft's use of transformers
    for renamed in ("LeafSpec", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", message=f".*{renamed}.*", category=FutureWarning)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)  # to run.log: how fast completions were sampled
    defaults = {
        "enable_progress_bar": sys.stderr.isatty(),
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        # every epoch's order is its own, and a round's pairs are made just before it
        "reload_dataloaders_every_n_epochs": 1,
    }
    try:
        RunCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=defaults,
            # refused settings come as exceptions, not as pages of usage
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
        )
    except RunFinishedError as finished:
        print(finished)
    except (InputError, RunError):
        raise
    except ArgumentError as error:
        raise InputError(sentence(str(error))) from error
    except Exception as error:
        if (mistake := _mistake_behind(error)) is not None:
            raise mistake from error
        logger.error("the run failed", exc_info=True)
        if processes.is_loss(error):
            raise RunError(
                "another process of this run has ended; remove the cause, which it has printed"
                " if it could, and go on with --ckpt_path last"
            ) from error
        raise RunError(f"{type(error).__name__}: {error}") from error


def _mistake_behind(error: BaseException) -> InputError | None:
    # jsonargparse wraps what a constructor raises into its own account of the types it tried
    return next((e for e in causes(error, hidden=True) if isinstance(e, InputError)), None)


@rank_zero_only
def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # one line without the source: the sentences are for users
    text = f"{category.__name__}: {message}"
    logger.warning(text)
    print(text, file=sys.stderr)
