from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from tests.callbacks.letters_run import context_of
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import TrajectorySnapshot, finish_round
from tpmm_pl.files import file_sha256
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore


def test_a_snapshot_is_the_policy_bit_for_bit(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, 4)
    finish_round([TrajectorySnapshot()], context)
    store = TrajectoryStore(tmp_path / "trajectory")
    record, source = store.record(4), store.source(4)
    assert record.snapshot == "round_004/policy.safetensors"
    assert record.sha256 == file_sha256(store.root / record.snapshot)
    assert dict(context.policy.named_parameters()).keys() == source.keys()
    for name, parameter in context.policy.named_parameters():
        assert torch.equal(source[name], parameter), name


@pytest.mark.parametrize("round_index", [0, 1])
def test_the_start_is_described_once(
    round_index: int, start: LettersPolicy, tmp_path: Path
) -> None:
    receiver = SimpleNamespace(policy_source=start)
    context = context_of(tmp_path, start, round_index, receiver=receiver)
    finish_round([TrajectorySnapshot()], context)
    described = TrajectoryStore(tmp_path / "trajectory").model
    assert described == ({} if round_index else start.describe())


def test_the_snapshot_of_an_adapter_is_one_that_peft_loads(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    source = PretrainedPolicy(str(tmp_path / "model"), lora=LoraSettings(r=2, alpha=4))
    context = context_of(tmp_path, source)
    for name, parameter in context.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    finish_round([TrajectorySnapshot()], context)
    folder = context.store.folder(0) / "adapter"
    assert context.store.record(0).snapshot == "round_000/adapter/adapter_model.safetensors"
    back = PeftModel.from_pretrained(tiny_llama(), folder)
    ids = torch.arange(2, 14).reshape(2, 6)
    assert torch.equal(back(ids).logits, context.policy(ids).logits)
