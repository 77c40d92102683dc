"""``tpmm merge`` takes what other trainers save while they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.commands.test_experts import run
from tests.models.tiny import tiny_llama, tiny_reward_model, tiny_tokenizer

trl = pytest.importorskip("trl")

ROWS = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(6)]
SETTINGS = {
    "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 3, "save_steps": 1,
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True,
}  # fmt: skip


def trained(kind: str, out: Path) -> list[Path]:
    """Train three steps by TRL, a checkpoint a step; return the folders."""
    rows = Dataset.from_list(ROWS)
    words = tiny_tokenizer(template=False)
    if kind == "dpo":
        # by its folder: TRL loads the reference from there
        tiny_llama().save_pretrained(out / "start")
        trainer: Any = trl.DPOTrainer(
            str(out / "start"), args=trl.DPOConfig(str(out), **SETTINGS), train_dataset=rows,
            processing_class=words,
        )  # fmt: skip
    else:
        rows = rows.map(lambda row: {n: row["prompt"] + row[n] for n in ("chosen", "rejected")})
        trainer = trl.RewardTrainer(
            tiny_reward_model(), args=trl.RewardConfig(str(out), **SETTINGS),
            train_dataset=rows.remove_columns("prompt"), processing_class=words,
        )  # fmt: skip
    trainer.train()
    return [out / f"checkpoint-{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "family"),
    [("dpo", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)],
)
def test_checkpoints_of_trl_are_averaged(kind: str, family: Any, tmp_path: Path) -> None:
    folders = trained(kind, tmp_path / "run")
    assert (folders[0] / "optimizer.pt").is_file()
    assert run("merge", *folders, "--out", tmp_path / "out") == 0
    states = [load_file(folder / "model.safetensors") for folder in folders]
    found = load_file(tmp_path / "out" / "model.safetensors")
    apart = 0.0
    for name, tensor in found.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)
        apart = max(apart, float((states[0][name] - states[2][name]).abs().max()))
    assert apart > 1e-3, "the checkpoints differ"
    _, info = family.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in written
    assert not written & {"optimizer.pt", "trainer_state.json", "training_args.bin"}


def test_coefficients_of_trls_checkpoints_are_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = trained("dpo", tmp_path / "run")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    capsys.readouterr()
    given = ["--method", "learned", "--pairs", tmp_path / "pairs.jsonl", "--json"]
    assert run("merge", *folders, "--out", tmp_path / "out", *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] < printed["loss_uniform"]
    assert sum(printed["coefficients"][0]) == pytest.approx(1.0)
