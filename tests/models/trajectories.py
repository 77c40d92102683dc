"""Trajectories of tiny models and adapters, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama
from tpmm_pl.models.weights import save_policy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Recipe

Factory = Callable[..., PreTrainedModel]
both_models = pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])

IDS = torch.arange(6, 30).reshape(3, 8)
WEIGHTS = (0.2, 0.3, 0.5)
MERGE = Recipe("learned", (0, 1, 2), (WEIGHTS,))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(IDS).logits
    return values


def base_of(factory: Factory) -> PreTrainedModel:
    model = factory(seed=0)
    model.eval()
    return model


def adapted(factory: Factory = tiny_llama, rank: int = 2, **settings: Any) -> PeftModel:
    config = LoraConfig(
        r=rank, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    policy = get_peft_model(base_of(factory), config)
    assert isinstance(policy, PeftModel)
    return policy


def randomise(policy: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def dense_trajectory(factory: Factory, root: Path) -> TrajectoryStore:
    store = TrajectoryStore(root)
    for seed in range(3):
        save_policy(factory(seed=seed), store, seed)
    return store


def adapter_trajectory(policy: PeftModel, root: Path, rounds: int = 3) -> TrajectoryStore:
    store = TrajectoryStore(root)
    for index in range(rounds):
        randomise(policy, seed=index)
        save_policy(policy, store, index)
    return store


def dense_states(store: TrajectoryStore, factory: Factory = tiny_llama) -> list[dict[str, Tensor]]:
    """Every snapshot as a full model, made by peft alone."""
    states = []
    for record in store.rounds:
        loaded = PeftModel.from_pretrained(base_of(factory), store.folder(record.round) / "adapter")
        states.append(dict(loaded.merge_and_unload().named_parameters()))
    return states


def dense_logits(state: dict[str, Tensor], factory: Factory = tiny_llama) -> Tensor:
    model = base_of(factory)
    model.load_state_dict(state, strict=False)
    return logits(model)


def assert_computes(policy: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(policy), expected, atol=1e-6, rtol=1e-6)


def products(policy: PeftModel) -> dict[str, Tensor]:
    """B A of every adapted layer."""
    adapter = dict(policy.named_parameters())
    return {
        name: adapter[name.replace("lora_A", "lora_B")].detach() @ a.detach()
        for name, a in adapter.items()
        if "lora_A" in name
    }
