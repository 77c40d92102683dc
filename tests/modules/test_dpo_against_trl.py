"""Twenty optimizer steps of DPO, with TRL's trainer as the oracle."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.models.tiny import tiny_llama, tiny_tokenizer
from tests.modules.twenty_steps import (
    ADAMW,
    RATE,
    STEPS,
    TRL_SETTINGS,
    LargeStart,
    Recorded,
    Row,
    fit,
    preference_rows,
    scored_under,
    tokenized,
)
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.types import Pair

pytest.importorskip("trl")
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

BETA = 0.5
METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)

START = LargeStart(tiny_llama)


class RecordedDPOTrainer(Recorded, DPOTrainer):
    pass


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return preference_rows()


@pytest.fixture(scope="module")
def pairs(rows: list[Row]) -> list[Pair]:
    return scored_under(START.load_model(), tokenized(rows))


def rate_of(weights: dict[str, float]) -> float:
    # a squared loss grows to 10 at the usual rate, where float32 does not resolve 1e-5 over steps
    return RATE / 10 if "sppo_hard" in weights else RATE


def fit_trl(rows: list[Row], weights: dict[str, float], smoothing: float, out: Path) -> Any:
    model = START.load_model()
    arguments = DPOConfig(
        output_dir=str(out),
        loss_type=list(weights),
        loss_weights=list(weights.values()),
        beta=BETA,
        label_smoothing=smoothing,
        **{**TRL_SETTINGS, "learning_rate": rate_of(weights)},
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
    ("weights", "smoothing", "first"),
    [
        ({"sigmoid": 1.0}, 0.0, log(2)),
        ({"robust": 1.0}, 0.1, log(2)),
        ({"ipo": 1.0}, 0.0, (1 / (2 * BETA)) ** 2),
        ({"hinge": 1.0}, 0.0, 1.0),
        ({"apo_zero": 1.0}, 0.0, 1.0),
        ({"sppo_hard": 1.0}, 0.0, 1 / (2 * BETA**2)),
        ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 0.1}, 0.0, None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_twenty_steps_cost_what_trls_do(
    rows: list[Row],
    pairs: list[Pair],
    tmp_path: Path,
    weights: dict[str, float],
    smoothing: float,
    first: float | None,
) -> None:
    trainer = fit_trl(rows, weights, smoothing, tmp_path)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert row["prompt_ids"] == list(pair.prompt_ids)
        assert row["chosen_ids"] == list(pair.chosen_ids)
        assert row["rejected_ids"] == list(pair.rejected_ids)
    optimizer = partial(ADAMW, lr=rate_of(weights))
    module = DPOModule(START, optimizer, loss=weights, beta=BETA, label_smoothing=smoothing)
    ours = fit(module, pairs)
    losses = [step["loss"] for step in ours]
    if first is not None:
        assert losses[0] == pytest.approx(first, abs=1e-5)
    assert max(abs(value - losses[0]) for value in losses) > 0.05, "the policy has moved"
    assert losses == pytest.approx(trainer.losses, abs=1e-5, rel=0)
    for name in METRICS:
        theirs = [step[name] for step in trainer.state.log_history[:STEPS]]
        assert [step[name] for step in ours] == pytest.approx(theirs, abs=1e-4), name
