from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.models import adapters, location
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.weights import materialise, save_policy
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

IDS = torch.arange(6, 30).reshape(3, 8)
SETTINGS = [LoraSettings(r=2), LoraSettings(r=2, use_rslora=True), LoraSettings(r=2, use_dora=True)]
every_kind = pytest.mark.parametrize("lora", SETTINGS, ids=["lora", "rslora", "dora"])


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    values: Tensor = model(IDS).logits
    return values


def policy_of(model: PreTrainedModel, root: Path, lora: LoraSettings) -> PeftModel:
    export_model(model, tiny_tokenizer(), None, root / "model")
    policy = PretrainedPolicy(str(root / "model"), lora=lora).load_model()
    assert isinstance(policy, PeftModel)
    return policy


def train(policy: PeftModel) -> None:
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)


def gradient(policy: Any) -> Tensor:
    policy.zero_grad()
    policy(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@every_kind
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_fresh_adapter_computes_what_the_model_does(
    make: Any, lora: LoraSettings, tmp_path: Path
) -> None:
    policy = policy_of(make(), tmp_path, lora)
    assert policy.training
    assert torch.equal(logits(policy), logits(make().eval()))
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("lora_magnitude_vector" in name for name in trained) == lora.use_dora


@every_kind
def test_the_start_of_a_trained_adapter_is_the_model_with_the_adapter_off(
    lora: LoraSettings, tmp_path: Path
) -> None:
    policy = policy_of(tiny_llama(), tmp_path, lora)
    store = TrajectoryStore(tmp_path / "trajectory")
    save_policy(policy, store, 0)
    train(policy)
    save_policy(policy, store, 1)
    assert not torch.equal(logits(policy), logits(tiny_llama().eval()))
    with policy.disable_adapter():
        anchor = logits(policy)
    assert torch.equal(anchor, logits(tiny_llama().eval()))
    materialise(policy, store, one_hot(0))
    assert torch.equal(logits(policy), anchor)


def test_an_adapter_names_its_model_by_the_hubs_id_or_by_a_path_that_is_right_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    policy: Any = PretrainedPolicy("model", lora=LoraSettings(r=2)).load_model()
    assert policy.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")
    monkeypatch.setattr(location, "snapshot_download", lambda *_, **__: str(tmp_path / "model"))
    policy = PretrainedPolicy("owner/name", lora=LoraSettings(r=2)).load_model()
    assert policy.peft_config["default"].base_model_name_or_path == "owner/name"


@pytest.mark.parametrize(
    ("name", "lora", "sentence"),
    [
        ("3bit", LoraSettings(), r"unknown quantization '3bit'; did you mean"),
        ("4bit", None, r"quantization 4bit freezes the weights.*; set lora too"),
        ("8bit", LoraSettings(use_dora=True), r"8bit does not give .*; take 4bit, or leave one"),
    ],
)
def test_a_quantisation_that_cannot_train_is_refused(
    name: Any, lora: LoraSettings | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        PretrainedPolicy("owner/name", lora=lora, quantization=name)


def test_a_missing_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"4bit needs bitsandbytes; pip install 'tpmm_pl\[qlora\]'"
    ):
        PretrainedPolicy("owner/name", lora=LoraSettings(), quantization="4bit")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize(
    ("bits", "kind", "dora"),
    [("4bit", "Linear4bit", False), ("4bit", "Linear4bit", True), ("8bit", "Linear8bitLt", False)],
)
def test_adapters_on_quantised_weights_train_and_come_back(
    bits: Any, kind: str, dora: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    export_model(model, tiny_tokenizer(), None, tmp_path / "model")
    lora = LoraSettings(r=4, use_dora=dora)
    source = PretrainedPolicy(str(tmp_path / "model"), lora=lora, quantization=bits)
    policy: Any = source.load_model()
    layer = policy.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == kind
    assert not any(p.requires_grad for n, p in policy.named_parameters() if "lora_" not in n)
    # the rounding of the weights, no more
    torch.testing.assert_close(logits(policy), logits(model.eval()), atol=0.15, rtol=0)
    with policy.disable_adapter():
        anchor = logits(policy)
    assert torch.equal(logits(policy), anchor)
    store = TrajectoryStore(tmp_path / "trajectory")
    save_policy(policy, store, 0)
    before = gradient(policy)
    # bitsandbytes multiplies 8-bit weights in another way in evaluation
    off = 0.0 if bits == "4bit" else 0.01
    torch.testing.assert_close(logits(policy.eval()), anchor, atol=off, rtol=0)
    # as after a round's end, where the policy is evaluated
    torch.testing.assert_close(gradient(policy.train()), before, atol=off, rtol=0)
    policy.zero_grad()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = policy(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    save_policy(policy, store, 1)
    trained = logits(policy)
    materialise(policy, store, one_hot(0))
    assert not torch.equal(logits(policy), trained)
    materialise(policy, store, one_hot(1))
    assert torch.equal(logits(policy), trained)
