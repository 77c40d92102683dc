"""Twenty optimizer steps of a module and of a trainer of TRL on the same pairs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.models.tiny import WORDS, tiny_tokenizer
from tpmm_pl.data.batching import PairLoader
from tpmm_pl.data.rows.formats import RawPair
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.types import Pair

STEPS, BATCH, RATE = 20, 4, 2e-3

Row = dict[str, Any]

ADAMW = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0)
TRL_SETTINGS: Row = {
    "max_length": 64,
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH,
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "learning_rate": RATE,
    "weight_decay": 0.0,  # transformers would leave the norms out of it
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
}
"""What makes TRL's trainers step as ours do."""


class LargeStart:
    """A start whose weights are large, so that twenty steps move it far."""

    def __init__(self, make_model: Callable[[], PreTrainedModel]) -> None:
        self.make_model = make_model

    def prepare(self) -> None:
        pass

    def load_model(self) -> PreTrainedModel:
        model = self.make_model()
        for parameter in model.parameters():
            parameter.data *= 3
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return tiny_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {}


class Recorded:
    """Lets a trainer of TRL keep the loss of every step; goes before its class."""

    losses: list[float]

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        above: Any = super()
        loss: Tensor = above.training_step(model, inputs, *rest)
        self.losses.append(loss.item())
        return loss


class Metrics(Callback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logged = trainer.callback_metrics.items()
        self.logs.append({name: float(value) for name, value in logged})


def preference_rows() -> list[Row]:
    """Return as many pairs with margins as twenty steps take."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    return [
        {
            "prompt": words(generator.randint(1, 6)) + " ",
            "chosen": words(generator.randint(1, 8)),
            "rejected": words(generator.randint(1, 8)),
            "margin": generator.random(),
        }
        for _ in range(STEPS * BATCH)
    ]


def tokenized(rows: list[Row]) -> list[Pair]:
    """Tokenise rows; none is cut or dropped."""
    raw = [
        RawPair(r["prompt"], chosen=r["chosen"], rejected=r["rejected"], margin=r.get("margin", 0))
        for r in rows
    ]
    pairs, counts = tokenize_pairs(raw, tiny_tokenizer(), max_length=64)
    assert not counts
    return list(pairs)


def scored_under(model: PreTrainedModel, pairs: list[Pair]) -> list[Pair]:
    """Write a model's log-probabilities to the pairs as their reference."""
    logps = score_pairs(model, pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    return [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]


def fit(module: LightningModule, pairs: list[Pair]) -> list[dict[str, float]]:
    """Train on the pairs in their order; return what every step logged."""
    metrics = Metrics()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[metrics],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = PairLoader(pairs, batch_size=BATCH, seed=0, epoch=0, shuffle=False)
    trainer.fit(module, loader)
    assert len(metrics.logs) == STEPS
    return metrics.logs
