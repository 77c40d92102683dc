"""A small fit on fixed pairs, in this process or in several that are forked from it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy

from tests.models.tiny import tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import OfflinePairs, ReferenceMerge, RoundCheckpoint, TrajectorySnapshot
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT, AtomicCheckpointIO
from tpmm_pl.data.module import RunData
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Pair

PAIRS = 24
"""Of a round."""


class TinySource:
    """A tiny model of some family, made anew from its seed."""

    def __init__(self, make: Callable[[], Any] = tiny_llama) -> None:
        self.make = make

    def prepare(self) -> None:
        pass

    def load_model(self) -> Any:
        model = self.make()
        model.train()
        return model

    def load_tokenizer(self) -> Any:
        return tiny_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {"source": "tiny"}


class FixedPairs(RunData):
    """Pairs drawn from a seed; of lengths so different that steps are cut unevenly."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, token_budget=60)

    def train_pairs(self, round_index: int) -> Sequence[Pair]:
        return drawn_pairs(PAIRS, f"round {round_index}")

    def fuse_pairs(self) -> Sequence[Pair]:
        return drawn_pairs(12, "fuse")


def drawn_pairs(count: int, seed: str) -> list[Pair]:
    generator = random.Random(seed)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(generator.randint(6, 31) for _ in range(generator.randint(1, longest)))

    return [
        Pair(f"{seed} {number}", f"{seed} {number}", "", "", ids(20), ids(12), ids(12))
        for number in range(count)
    ]


class Losses(Callback):
    """Writes the losses of all steps, from the first process."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "losses.json"
            file.write_text(json.dumps(self.losses))


def fit(
    root: Path,
    *,
    strategy: str = "auto",
    processes: int = 1,
    rounds: int = 2,
    source: TinySource | None = None,
    resume: bool = False,
    precision: Any = "32-true",
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train rounds of DPO with learned merges; a step has eight pairs of all processes."""
    seed_everything(3, verbose=False)
    module = DPOModule(
        source or TinySource(),
        partial(torch.optim.AdamW, lr=3e-3),
        rounds=rounds,
        gradient_clip_val=1.0,
    )
    sharded: Any = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=rounds,
        accelerator="cpu",
        devices=processes,
        strategy=sharded if strategy == "fsdp2" else strategy,
        precision=precision,
        callbacks=[
            TrajectorySnapshot(),
            ReferenceMerge("learned", fusion=FusionSettings(steps=4, batch_size=8), ship_steps=2),
            OfflinePairs(),
            Losses(),
            RoundCheckpoint(),
            *callbacks,
        ],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,  # how often processes ask each other for signals
    )
    path = root / CHECKPOINT if resume else None
    data = FixedPairs(8 // processes)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True if path else None)


def together(work: Callable[[], None], processes: int = 2, start: str = "fork") -> None:
    """Run ``work`` in processes that see the environment of ``torchrun``.

    Args:
        work: The same for all.
        processes: How many.
        start: Forked or, with a memory of their own, as by ``spawn``.

    Raises:
        RuntimeError: If one of them fails.
    """
    codes = exit_codes(work, processes, start)
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}")


def exit_codes(
    work: Callable[[], None], processes: int = 2, start: str = "fork"
) -> list[int | None]:
    """Run ``work`` in processes; return their exit codes, ``None`` of one that hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = multiprocessing.get_context(start)
    children = [
        context.Process(target=_as_rank, args=(work, rank, processes, port))
        for rank in range(processes)
    ]
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where a spawned child finds this file
    for child in children:
        child.start()
    sys.path.pop(0)
    for child in children:
        child.join(240)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def _as_rank(work: Callable[[], None], rank: int, processes: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    work()
    if dist.is_initialized():
        dist.destroy_process_group()


def losses(root: Path) -> list[float]:
    """Return the losses of a fit's steps."""
    values: list[float] = json.loads((root / "losses.json").read_text())
    return values


def coefficients(root: Path) -> list[float]:
    """Return all coefficients that a fit has learned, shipped ones too."""
    store = TrajectoryStore(root / "trajectory")
    recipes = [record.recipe for record in store.rounds if record.recipe]
    recipes += [recipe for record in store.rounds for recipe in record.ship.values()]
    return [value for recipe in recipes for row in recipe.coefficients for value in row]


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of all snapshots."""
    store = TrajectoryStore(root / "trajectory")
    return {
        f"{record.round} {name}": tensor
        for record in store.rounds
        for name, tensor in store.source(record.round).items()
    }


class PeakMemory:
    """Samples the private memory of this process inside a block; ``bytes`` above its start."""

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = _private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _private_bytes())


def _private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
