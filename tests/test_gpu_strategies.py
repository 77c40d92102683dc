"""Runs that need an accelerator: DeepSpeed, FSDP1, and a model of a billion parameters."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.tiny import EOS, PAD, WORDS, tiny_llama, tiny_tokenizer
from tpmm_pl.cli import main
from tpmm_pl.trajectory import TrajectoryStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def billion_llama() -> LlamaForCausalLM:
    """1.1 billion random parameters in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    return model


def fit(
    folder: Path, model: LlamaForCausalLM, *flags: object, monkeypatch: pytest.MonkeyPatch
) -> TrajectoryStore:
    """Run two rounds of ``tpmm fit`` on pairs of words; return the trajectory."""
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"{WORDS[n % 26]} {WORDS[n // 2]}", "chosen": WORDS[n // 3], "rejected": "w1"}
        for n in range(6, 46)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "tpmm", "fit", "--config", "configs/preferences.yaml",
        "--model.policy.name_or_path", folder / "model", "--data.train", folder / "pairs.jsonl",
        "--data.cache_dir", folder / "cache", "--data.batch_size", 4, "--model.rounds", 2,
        "--reference.fusion.steps", 2, "--reference.fusion.batch_size", 4,
        "--trainer.accelerator", "gpu", "--trainer.default_root_dir", folder / "run", *flags,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    main()
    return TrajectoryStore(folder / "run" / "trajectory")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2"])
def test_a_strategy_of_lightning_trains_on_one_accelerator(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    # neither strategy clips by the module's setting
    flags = ["--trainer.strategy", strategy, "--trainer.precision", "bf16-mixed"]
    flags += ["--model.gradient_clip_val", "null", "--reference.next_policy", "last"]
    store = fit(tmp_path, tiny_llama(tied=True), *flags, monkeypatch=monkeypatch)
    start, *trained = (store.source(index) for index in range(3))
    for policy in trained:
        assert {n: t.shape for n, t in policy.items()} == {n: t.shape for n, t in start.items()}
        assert any(not torch.equal(tensor, start[name]) for name, tensor in policy.items())


def test_a_billion_parameters_train_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.cuda.reset_peak_memory_stats()
    flags = ["--model.policy.dtype", "bfloat16", "--trainer.precision", "bf16-true"]
    store = fit(tmp_path, billion_llama(), *flags, monkeypatch=monkeypatch)
    assert [record.round for record in store.rounds] == [0, 1, 2]
    with safe_open(tmp_path / "run" / "export" / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    recipe = store.record(2).recipe
    assert recipe is not None
    assert sum(recipe.coefficients[0]) == pytest.approx(1)
    # weights, gradients and two moments are 9 GB
    print(f"peak of the device: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    assert torch.cuda.max_memory_allocated() < 20e9
