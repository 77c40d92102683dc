"""Twenty optimizer steps of a reward model, with TRL's trainer as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.models.tiny import tiny_reward_model, tiny_tokenizer
from tests.modules.twenty_steps import (
    ADAMW,
    STEPS,
    TRL_SETTINGS,
    LargeStart,
    Recorded,
    Row,
    fit,
    preference_rows,
    tokenized,
)
from tpmm_pl.modules.reward import RewardModule

pytest.importorskip("trl")
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

METRICS = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")

START = LargeStart(tiny_reward_model)


class RecordedRewardTrainer(Recorded, RewardTrainer):
    pass


def fit_trl(rows: list[Row], centring: float | None, out: Path) -> Any:
    arguments = RewardConfig(
        output_dir=str(out), center_rewards_coefficient=centring, **TRL_SETTINGS
    )
    trainer = RecordedRewardTrainer(
        START.load_model(),
        args=arguments,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.losses = []
    trainer.train()
    return trainer


@pytest.mark.parametrize(("margins", "centring"), [(False, None), (True, None), (True, 0.05)])
def test_twenty_steps_cost_what_trls_do(
    tmp_path: Path, margins: bool, centring: float | None
) -> None:
    rows = preference_rows()
    if not margins:
        rows = [{name: value for name, value in r.items() if name != "margin"} for r in rows]
    trainer, pairs = fit_trl(rows, centring, tmp_path), tokenized(rows)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert row["chosen_ids"] == [*pair.prompt_ids, *pair.chosen_ids]
        assert row["rejected_ids"] == [*pair.prompt_ids, *pair.rejected_ids]
    ours = fit(RewardModule(START, ADAMW, centring=centring or 0.0), pairs)
    losses = [step["loss"] for step in ours]
    assert losses[-1] != pytest.approx(losses[0], abs=0.05), "the model has moved"
    assert losses == pytest.approx(trainer.losses, abs=1e-5)
    # TRL rounds the loss it logs
    for name in METRICS:
        theirs = [step[name] for step in trainer.state.log_history[:STEPS]]
        assert [step[name] for step in ours] == pytest.approx(theirs, abs=1e-5), name
