from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.tiny import tiny_reward_model, tiny_tokenizer
from tpmm_pl.callbacks import RewardExport
from tpmm_pl.models.export import export_model
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.moe.routing import MoESettings


@pytest.mark.parametrize("moe", [None, MoESettings(experts=4, active=2)])
def test_an_exported_reward_model_has_a_card(moe: MoESettings | None, tmp_path: Path) -> None:
    export_model(tiny_reward_model(), tiny_tokenizer(), None, tmp_path / "model")
    source = PretrainedReward(str(tmp_path / "model"), moe=moe)
    module: Any = SimpleNamespace(reward=source.load_model(), reward_source=source)
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        default_root_dir=tmp_path,
        datamodule=SimpleNamespace(tokenizer=source.load_tokenizer()),
        callback_metrics={"eval/accuracy": torch.tensor(0.75), "loss": torch.tensor(0.5)},
    )
    RewardExport().on_fit_end(trainer, module)
    card = (tmp_path / "export" / "reward" / "README.md").read_text(encoding="utf-8")
    assert "| eval/accuracy | 0.75 |" in card
    assert "| loss |" not in card, "of one batch of training"
    assert "| base model | model |" in card
    assert ("| moe |" in card) == (moe is not None)
    assert "base_model:" not in card, "a folder is none for the hub"
