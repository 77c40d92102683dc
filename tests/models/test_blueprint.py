from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_reward_model, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.blueprint import (
    blueprint,
    cache_bytes,
    kept_bytes,
    saved_bytes,
    stored_bytes,
)
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.models.roomy_cache import roomy_cache
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.models.source import PolicySource
from tpmm_pl.models.tree_pass import unwrapped
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import Pair

LORA = LoraSettings(r=2)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return saved(tiny_llama(tied=True), tmp_path / "policy")


def shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    return [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    "kind", ["whole", "lora", "bfloat16", "reward", "reward lora", "reward of a policy", "experts"]
)
def test_a_blueprint_has_the_parameters_of_the_loaded_model(
    kind: str, policy: str, tmp_path: Path
) -> None:
    reward = saved(tiny_reward_model(), tmp_path / "reward")
    sources: dict[str, PolicySource] = {
        "whole": PretrainedPolicy(policy),
        "lora": PretrainedPolicy(policy, lora=LORA),
        "bfloat16": PretrainedPolicy(policy, dtype="bfloat16"),
        "reward": PretrainedReward(reward),
        "reward lora": PretrainedReward(reward, lora=LORA),
        "reward of a policy": PretrainedReward(policy),
        "experts": PretrainedReward(reward, moe=MoESettings(experts=3, active=2)),
    }
    drawn = blueprint(sources[kind])
    loaded = sources[kind].load_model()
    assert {p.device.type for p in drawn.parameters()} == {"meta"}
    assert shapes(drawn) == shapes(loaded)
    assert stored_bytes(drawn) == stored_bytes(loaded)


def test_only_the_configuration_of_a_model_is_read(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "large")
    model = blueprint(PretrainedPolicy(str(tmp_path / "large"), dtype="bfloat16"))
    # Llama 3 70B, as published
    assert sum(p.numel() for p in model.parameters()) == 70_553_706_496
    # 80 layers, 8 heads of 128 numbers of 2 bytes, keys and values
    assert cache_bytes(model) == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_what_a_pass_keeps_is_counted_without_running_it(
    family: type, lora: LoraSettings | None, tmp_path: Path
) -> None:
    source = PretrainedPolicy(saved(family(), tmp_path / "model"), lora=lora)
    model = source.load_model()
    ids = torch.arange(96)[None] % 32
    inner = unwrapped(model).base_model
    real = kept_bytes(model, lambda: inner(input_ids=ids, use_cache=False))  # type: ignore[operator]
    counted = saved_bytes(blueprint(source), 96)
    # but for what one pass keeps once, as positions and their angles
    assert counted == pytest.approx(real, rel=0.05)
    assert saved_bytes(blueprint(source), 192) == pytest.approx(2 * real, rel=0.05)


def test_a_packed_step_keeps_what_was_counted_and_its_logits(policy: str) -> None:
    source = PretrainedPolicy(policy)
    model = source.load_model()
    pairs = [
        Pair(str(n), "", "", "", (6, 7, n), tuple(range(8, 24)), tuple(range(9, 31)))
        for n in range(8, 20)
    ]
    batch, scorer = collate(pairs), PairScorer(model)
    real = kept_bytes(model, lambda: scorer(batch))
    counted = saved_bytes(blueprint(source), len(batch.tree.tokens))
    assert counted is not None
    logits = 4 * 32 * len(batch.tree.states)
    # attention of trees keeps the prompts' keys and values once more for every branch
    assert counted + logits <= real <= 1.33 * (counted + logits)


def test_checkpointed_activations_are_the_inputs_of_blocks_and_one_block(policy: str) -> None:
    whole = saved_bytes(blueprint(PretrainedPolicy(policy)), 96)
    source = PretrainedPolicy(policy, gradient_checkpointing=True)
    model = blueprint(source)
    assert whole is not None
    # two layers of width 16 in float32
    assert saved_bytes(model, 96) == whole // 2 + 2 * 96 * 16 * 4
    assert saved_bytes(model, 96) == whole // 2 + 2 * 96 * 16 * 4  # it is on again


def test_a_token_of_the_cache_is_what_a_pass_adds_to_it(policy: str) -> None:
    model = PretrainedPolicy(policy).load_model()
    cache = roomy_cache(model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None], past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    keys_and_values = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    added = sum(t[:, :, :8].numel() * t.element_size() for t in keys_and_values)
    assert cache_bytes(model) == added / 8


def test_quantised_layers_are_smaller_and_the_head_is_not(policy: str) -> None:
    model = blueprint(PretrainedPolicy(policy, lora=LORA))
    # 2304 numbers of a layer's matrices, in two layers, at 4 bytes and at 1
    assert stored_bytes(model) - stored_bytes(model, "8bit") == 2 * 2304 * 3
    assert stored_bytes(model) - stored_bytes(model, "4bit") == round(2 * 2304 * 3.47)
