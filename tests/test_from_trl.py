"""The tables of docs/from_trl.md against TRL's configurations and our signatures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import TrainingArguments

from tpmm_pl.callbacks import (
    ModelExport,
    OfflinePairs,
    ReferenceMerge,
    RoundCheckpoint,
)
from tpmm_pl.data.module import PreferenceData
from tpmm_pl.data.rewards import RewardData
from tpmm_pl.losses.choice import LOSSES
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.reward import RewardModule

PAGE = Path("docs/from_trl.md").read_text(encoding="utf-8")

POLICY: dict[str, Callable[..., Any]] = {
    "trainer": Trainer,
    "model": DPOModule,
    "model.policy": PretrainedPolicy,
    "model.policy.lora": LoraSettings,
    "data": PreferenceData,
    "reference": ReferenceMerge,
    "pairs": OfflinePairs,
    "checkpoint": RoundCheckpoint,
    "export": ModelExport,
}
REWARD: dict[str, Callable[..., Any]] = {
    "model": RewardModule,
    "model.reward": PretrainedReward,
    "data": RewardData,
}
# arguments of the command, and of the class that a config names
ELSEWHERE = ("seed_everything", "ckpt_path", "model.optimizer.")


def rows(heading: str) -> list[tuple[list[str], list[str]]]:
    """Return the names in the first two columns of the tables below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("| `"):
            theirs, ours, *_ = line.strip("| ").split("|")
            found.append((re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)))
    assert found
    return found


def names_of(config: type) -> set[str]:
    return {field.name for field in fields(config)}


def named(heading: str) -> set[str]:
    return {name for theirs, _ in rows(heading) for name in theirs}


@pytest.mark.parametrize(("heading", "name"), [("DPOConfig", "DPOConfig"), ("RewardConfig",) * 2])
def test_every_field_of_a_configuration_is_in_its_table(heading: str, name: str) -> None:
    trl = pytest.importorskip("trl")
    of_config, of_arguments = names_of(getattr(trl, name)), names_of(TrainingArguments)
    table = named(heading) - {name, "TrainingArguments"}
    assert table >= of_config - of_arguments
    assert table <= of_config


def test_every_field_of_the_models_configuration_is_in_its_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOConfig

    arguments = set(signature(trl.DPOTrainer.__init__).parameters)
    table = named("DPOTrainer and ModelConfig")
    of_model = names_of(trl.ModelConfig)
    assert table >= of_model - {"trust_remote_code"}
    assert table >= arguments - {"self", "args"}
    assert table <= of_model | arguments
    assert named("CPOConfig and ORPOConfig") - {"trl.experimental"} <= names_of(CPOConfig)


@pytest.mark.parametrize(
    ("heading", "classes"),
    [
        ("DPOConfig", POLICY),
        ("DPOTrainer and ModelConfig", POLICY),
        ("CPOConfig and ORPOConfig", POLICY),
        ("RewardConfig", REWARD),
    ],
)
def test_our_settings_in_the_tables_exist(
    heading: str, classes: dict[str, Callable[..., Any]]
) -> None:
    ours = [name for _, names in rows(heading) for name in names if not name.startswith(ELSEWHERE)]
    assert ours
    for name in ours:
        place, _, setting = name.rpartition(".")
        assert setting in signature(classes[place]).parameters, name


def test_every_loss_has_a_row_and_every_row_a_loss() -> None:
    ours = {name for _, names in rows("Losses") for name in names}
    assert ours == set(LOSSES)


def test_every_loss_type_of_trl_has_a_row() -> None:
    trl = pytest.importorskip("trl")
    described = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = set(re.findall(r"`'(\w+)'`", described))
    assert len(theirs) == 15
    assert theirs <= named("Losses")
