"""Twenty optimizer steps of DPO, with TRL's trainer as the oracle."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.callbacks.recorder import Recorder
from tests.models.tiny import PAD, WORDS, tiny_llama, tiny_tokenizer
from tpmm_pl.data.batching import PairLoader
from tpmm_pl.data.chat import tokenize_pairs
from tpmm_pl.data.formats import RawPair
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.types import Pair

pytest.importorskip("trl")
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

STEPS, BATCH, BETA, RATE = 20, 4, 0.5, 2e-3

Row = dict[str, str]


class LargeLlama:
    """A start whose weights are large, so that twenty steps move it far from the reference."""

    def prepare(self) -> None:
        pass

    def load_model(self) -> PreTrainedModel:
        model = tiny_llama(seed=0)
        for parameter in model.parameters():
            parameter.data *= 3
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return tiny_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {}


class RecordedDPOTrainer(DPOTrainer):
    """Keeps the loss of every step."""

    losses: list[float]

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]
        self.losses.append(loss.item())
        return loss


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
        }
        for _ in range(STEPS * BATCH)
    ]


@pytest.fixture(scope="module")
def pairs(rows: list[Row]) -> list[Pair]:
    raw = [RawPair(row["prompt"], chosen=row["chosen"], rejected=row["rejected"]) for row in rows]
    pairs, counts = tokenize_pairs(raw, tiny_tokenizer(), max_length=64)
    assert not counts
    return pairs


def fit_ours(pairs: list[Pair], loss: str, smoothing: float) -> list[float]:
    scored = scored_under(LargeLlama().load_model(), pairs)
    module = DPOModule(
        LargeLlama(),
        partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0),
        loss=loss,
        beta=BETA,
        label_smoothing=smoothing,
    )
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = PairLoader(scored, batch_size=BATCH, pad_id=PAD, seed=0, epoch=0, shuffle=False)
    trainer.fit(module, loader)
    return recorder.losses[0]


def scored_under(model: PreTrainedModel, pairs: list[Pair]) -> list[Pair]:
    logps = score_pairs(model, pairs, pad_id=PAD, batch_size=16)
    return [
        Pair(**{**vars(pair), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
        for pair, chosen, rejected in zip(
            pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True
        )
    ]


def fit_trl(rows: list[Row], loss: str, smoothing: float, out: Path) -> RecordedDPOTrainer:
    model = LargeLlama().load_model()
    arguments = DPOConfig(
        output_dir=str(out),
        loss_type=[loss],
        beta=BETA,
        label_smoothing=smoothing,
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
        report_to=[],
        disable_tqdm=True,
    )
    trainer = RecordedDPOTrainer(
        model,
        ref_model=deepcopy(model),
        args=arguments,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.losses = []
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("loss", "trls_name", "smoothing", "first"),
    [
        ("sigmoid", "sigmoid", 0.0, log(2)),
        ("rdpo", "robust", 0.1, log(2)),
        ("ipo", "ipo", 0.0, (1 / (2 * BETA)) ** 2),
    ],
)
def test_twenty_steps_cost_what_trls_do(
    rows: list[Row],
    pairs: list[Pair],
    tmp_path: Path,
    loss: str,
    trls_name: str,
    smoothing: float,
    first: float,
) -> None:
    trainer = fit_trl(rows, trls_name, smoothing, tmp_path)
    fed: Any = trainer.train_dataset
    for row, pair in zip(fed, pairs, strict=True):
        assert row["prompt_ids"] == list(pair.prompt_ids)
        assert row["chosen_ids"] == list(pair.chosen_ids)
        assert row["rejected_ids"] == list(pair.rejected_ids)
    ours = fit_ours(pairs, loss, smoothing)
    assert len(ours) == STEPS
    assert ours[0] == pytest.approx(first, abs=1e-5)
    assert max(abs(value - first) for value in ours) > 0.05, "the policy has moved"
    assert ours == pytest.approx(trainer.losses, abs=1e-5)
