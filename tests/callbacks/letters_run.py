"""Tiny runs of the letters task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from tpmm_pl.callbacks import (
    OnPolicyPairs,
    ReferenceMerge,
    RoundCallback,
    RoundCheckpoint,
    RoundContext,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.callbacks.round_context import Stage
from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.models.source import PolicySource
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.noise import LabelNoise
from tpmm_pl.toy.judges import LettersProxy
from tpmm_pl.toy.module import LettersData
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Pair

FUSION = FusionSettings(steps=4, batch_size=8)


def letters_data(**settings: Any) -> LettersData:
    sizes = {
        "batch_size": 8,
        "prompts_per_round": 16,
        "start_fuse_prompts": 8,
        "fuse_prompts_per_round": 8,
        "evaluation_prompts": 6,
    }
    return LettersData(**{**sizes, **settings})


def letters_pairs(**settings: Any) -> OnPolicyPairs:
    usual = {
        "annotator": LettersProxy(),
        "method": "adjacent",
        "samples": 4,
        "max_new_tokens": 6,
        "noise": LabelNoise(temperature=0.1, flip=0.2),
    }
    return OnPolicyPairs(**{**usual, **settings})


def fit(
    root: Path,
    source: PolicySource,
    callbacks: Sequence[Callback],
    *,
    rounds: int = 2,
    data: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> TrajectoryStore:
    """Train ``rounds`` rounds of DPO and return the trajectory."""
    seed_everything(3, verbose=False)
    usual: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=3e-3)}
    module = DPOModule(source, rounds=rounds, **{**usual, **settings})
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=rounds * module.epochs_per_round,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(one, RoundCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    weights_only = None if ckpt_path is None else True
    data = letters_data() if data is None else data
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=weights_only)
    return TrajectoryStore(root / "trajectory")


def fit_with(root: Path, source: PolicySource, reference: ReferenceMerge) -> TrajectoryStore:
    """Train three rounds; the learned fit at the end, which is of no account, has one step."""
    reference.ship_steps = 1
    return fit(root, source, [TrajectorySnapshot(), reference, letters_pairs()], rounds=3)


def round_pairs(store: TrajectoryStore, round_index: int) -> Sequence[Pair]:
    """Return what was written after a round, for training the next."""
    written = store.record(round_index).pairs
    assert written is not None
    return read_pairs(store.path(written))


def fuse_pairs(store: TrajectoryStore, round_index: int) -> Sequence[Pair]:
    written = store.record(round_index).fuse
    assert written is not None
    return read_pairs(store.path(written))


def context_of(
    root: Path, source: PolicySource, round_index: int = 0, **settings: Any
) -> RoundContext:
    """Return the context of a round's end without a Trainer, by default in a new trajectory."""
    data = settings.pop("data", None) or letters_data()
    data.tokenizer = source.load_tokenizer()
    store = settings.pop("store", None) or TrajectoryStore(root / "trajectory")
    return RoundContext(
        settings.pop("policy", None) or source.load_model(),
        store,
        round_index,
        data=data,
        **settings,
    )


def snapshots(root: Path, source: PolicySource, count: int) -> RoundContext:
    """Write the start and ``count`` perturbed policies; return the last one's context."""
    context = context_of(root, source)
    generator = torch.Generator().manual_seed(0)
    for index in range(count + 1):
        context = context_of(
            root, source, index, policy=context.policy, store=context.store, data=context.data
        )
        finish_round([TrajectorySnapshot()], context)
        if index < count:
            for parameter in context.policy.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.02 * noise
    return context


class Fixed(RoundCallback):
    """Runs one function as a stage."""

    def __init__(self, name: str, stage: Stage) -> None:
        super().__init__()
        self.name, self.stage = name, stage

    def stages(self) -> dict[str, Stage]:
        return {self.name: self.stage}
