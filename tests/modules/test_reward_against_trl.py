"""Twenty optimizer steps of a reward model, with TRL's trainer as the oracle."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.models.tiny import PAD, WORDS, tiny_reward_model, tiny_tokenizer
from tpmm_pl.data.batching import PairLoader
from tpmm_pl.data.chat import tokenize_pairs
from tpmm_pl.data.formats import RawPair
from tpmm_pl.modules.reward import RewardModule
from tpmm_pl.types import Pair

pytest.importorskip("trl")
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

STEPS, BATCH, RATE = 20, 4, 2e-3
NAMES = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")

Row = dict[str, Any]
Logs = list[dict[str, float]]


class LargeLlama:
    """A start whose weights are large, so that its rewards are far from 0."""

    def prepare(self) -> None:
        pass

    def load_model(self) -> PreTrainedModel:
        model = tiny_reward_model()
        for parameter in model.parameters():
            parameter.data *= 3
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return tiny_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {}


class RecordedRewardTrainer(RewardTrainer):
    """Keeps the loss of every step."""

    losses: list[float]

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]
        self.losses.append(loss.item())
        return loss


class Metrics(Callback):
    """Keeps what every step logged."""

    def __init__(self) -> None:
        self.logs: Logs = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logs.append({name: float(trainer.callback_metrics[name]) for name in NAMES})


@pytest.fixture(scope="module")
def rows() -> list[Row]:
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
    raw = [
        RawPair(r["prompt"], chosen=r["chosen"], rejected=r["rejected"], margin=r.get("margin", 0))
        for r in rows
    ]
    pairs, counts = tokenize_pairs(raw, tiny_tokenizer(), max_length=64)
    assert not counts
    return pairs


def fit_ours(pairs: list[Pair], centring: float) -> Logs:
    module = RewardModule(
        LargeLlama(), partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0), centring=centring
    )
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
    loader = PairLoader(pairs, batch_size=BATCH, pad_id=PAD, seed=0, epoch=0, shuffle=False)
    trainer.fit(module, loader)
    return metrics.logs


def fit_trl(rows: list[Row], centring: float | None, out: Path) -> RecordedRewardTrainer:
    arguments = RewardConfig(
        output_dir=str(out),
        center_rewards_coefficient=centring,
        max_length=64,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=RATE,
        weight_decay=0.0,  # transformers would leave the norms out of it
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = RecordedRewardTrainer(
        LargeLlama().load_model(),
        args=arguments,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.losses = []
    trainer.train()
    return trainer


@pytest.mark.parametrize(("margins", "centring"), [(False, None), (True, None), (True, 0.05)])
def test_twenty_steps_cost_what_trls_do(
    rows: list[Row], tmp_path: Path, margins: bool, centring: float | None
) -> None:
    if not margins:
        rows = [{name: value for name, value in r.items() if name != "margin"} for r in rows]
    trainer, pairs = fit_trl(rows, centring, tmp_path), tokenized(rows)
    fed: Any = trainer.train_dataset
    for row, pair in zip(fed, pairs, strict=True):
        assert row["chosen_ids"] == [*pair.prompt_ids, *pair.chosen_ids]
        assert row["rejected_ids"] == [*pair.prompt_ids, *pair.rejected_ids]
    ours = fit_ours(pairs, centring or 0.0)
    losses = [step["loss"] for step in ours]
    assert len(losses) == STEPS
    assert losses[-1] != pytest.approx(losses[0], abs=0.05), "the model has moved"
    assert losses == pytest.approx(trainer.losses, abs=1e-5)
    # TRL rounds the loss it logs
    for name in NAMES[1:]:
        theirs = [step[name] for step in trainer.state.log_history[:STEPS]]
        assert [step[name] for step in ours] == pytest.approx(theirs, abs=1e-5), name
