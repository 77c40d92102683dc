"""Two processes train the reward model that one trains, and one of them writes it."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import WORDS, tiny_reward_model, tiny_tokenizer
from tests.two_processes import exit_codes
from tpmm_pl import cli

LORA = ["--model.reward.lora.r", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_reward_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{WORDS[n % 26]} {WORDS[n // 2]}", "chosen": WORDS[n // 3], "rejected": "w1"}
        for n in range(6, 46)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(folder: Path, name: str, flags: list[str]) -> None:
    """Run ``tpmm fit`` as one of the processes; what it prints goes to a file."""
    printed = folder / f"{name}_{os.environ['RANK']}"
    sys.stdout = sys.stderr = printed.open("w", buffering=1)
    sys.argv = [
        "tpmm", "fit", "--config", "configs/reward_preferences.yaml",
        "--model.reward.name_or_path", str(folder / "model"), "--data.train",
        str(folder / "pairs.jsonl"), "--data.cache_dir", str(folder / "cache"),
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder / name),
        # within the epoch, so that the last step is measured after the fit
        "--trainer.max_steps", "3", "--model.optimizer.lr", "0.01", *flags,
    ]  # fmt: skip
    cli.main()


@pytest.mark.parametrize(
    ("strategy", "flags"), [("ddp", []), ("fsdp2", []), ("fsdp2", LORA)], ids=str
)
def test_two_processes_write_what_one_writes(strategy: str, flags: list[str], folder: Path) -> None:
    alone = ["--data.batch_size", "8", *flags]
    assert exit_codes(partial(train, folder, "one", alone), processes=1) == [0]
    overlay = ["--config", f"configs/overlays/{strategy}.yaml", "--data.batch_size", "4", *flags]
    assert exit_codes(partial(train, folder, "two", overlay)) == [0, 0]
    one, two = (load_file(f / "export" / "reward" / "model.safetensors") for f in _runs(folder))
    start = load_file(folder / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    assert any((tensor - start[name]).abs().max() > 1e-3 for name, tensor in one.items())
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], atol=1e-5, rtol=0, msg=name)
    assert "accuracy" in (folder / "two_0").read_text()
    assert "accuracy" not in (folder / "two_1").read_text()


def _runs(folder: Path) -> tuple[Path, Path]:
    return folder / "one", folder / "two"
