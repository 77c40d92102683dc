from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from tests.models.tiny import tiny_llama
from tests.models.trajectories import (
    MERGE,
    WEIGHTS,
    Factory,
    adapted,
    adapter_trajectory,
    assert_computes,
    base_of,
    both_models,
    dense_logits,
    dense_states,
    logits,
    randomise,
)
from tpmm_pl.merging import linear_merge
from tpmm_pl.models.stacking import is_mergeable
from tpmm_pl.models.weights import (
    become,
    materialise,
    materialise_cut,
    policy_state,
    save_policy,
)
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Recipe

MODULES = {"modules_to_save": ["lm_head"]}
MAGNITUDES = {"use_dora": True}
EMBEDDINGS = {"target_modules": ["embed_tokens", "q_proj"]}


def factors_and_more(**settings: Any) -> PeftModel:
    config = LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 3,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    policy = get_peft_model(base_of(tiny_llama), config)
    assert isinstance(policy, PeftModel)
    return policy


@both_models
def test_merged_adapters_compute_what_the_sum_of_their_products_does(
    factory: Factory, tmp_path: Path
) -> None:
    policy = adapted(factory)
    store = adapter_trajectory(policy, tmp_path)
    materialise(policy, store, MERGE)
    dense = linear_merge(dense_states(store, factory), torch.tensor(WEIGHTS))
    expected = dense_logits(dense, factory)
    assert_computes(policy, expected)
    assert (logits(base_of(factory)) - expected).abs().max() > 0.05


def test_merged_adapters_are_those_that_peft_concatenates(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    materialise(policy, store, MERGE)
    folders = [store.folder(index) / "adapter" for index in range(3)]
    theirs = PeftModel.from_pretrained(base_of(tiny_llama), folders[0], adapter_name="0")
    for index in (1, 2):
        theirs.load_adapter(folders[index], adapter_name=str(index))
    theirs.add_weighted_adapter(["0", "1", "2"], list(WEIGHTS), "all", combination_type="cat")
    theirs.set_adapter("all")
    assert_computes(policy, logits(theirs))


def test_averaging_a_and_b_apart_would_be_another_function(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    materialise(policy, store, MERGE)
    merged = logits(policy)
    materialise(policy, store, Recipe("last", (0,)))
    averaged = linear_merge([dict(s) for s in store.sources(MERGE)], torch.tensor(WEIGHTS))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(averaged[name.replace(".default.", ".")])
    assert (logits(policy) - merged).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 8}},
        {"rank_pattern": {"q_proj": 4, "down_proj": 1}},
    ],
)
def test_the_scale_and_rank_of_every_adapted_layer_are_kept(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    policy = adapted(**settings)
    store = adapter_trajectory(policy, tmp_path)
    materialise(policy, store, MERGE)
    expected = dense_logits(linear_merge(dense_states(store), torch.tensor(WEIGHTS)))
    assert_computes(policy, expected)


def test_a_merge_after_a_merge_takes_its_place(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    states = dense_states(store)
    for snapshots, weights in (((0, 1), (0.4, 0.6)), ((0, 1, 2), WEIGHTS), ((1, 2), (1.5, -0.5))):
        materialise(policy, store, Recipe("learned", snapshots, (weights,)))
        chosen = [states[index] for index in snapshots]
        expected = dense_logits(linear_merge(chosen, torch.tensor(weights)))
        assert_computes(policy, expected)


@pytest.mark.parametrize("settings", [{}, MODULES, MAGNITUDES, EMBEDDINGS])
def test_a_snapshot_has_what_peft_itself_would_save(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    policy = factors_and_more(**settings)
    randomise(policy, seed=0)
    theirs = get_peft_model_state_dict(policy, save_embedding_layers=False)
    ours = policy_state(policy)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    store = TrajectoryStore(tmp_path)
    save_policy(policy, store, 0)
    loaded = PeftModel.from_pretrained(base_of(tiny_llama), store.folder(0) / "adapter")
    assert torch.equal(logits(loaded), logits(policy))
    randomise(policy, seed=1)
    assert not torch.equal(logits(loaded), logits(policy))
    materialise(policy, store, Recipe("last", (0,)))
    assert torch.equal(logits(loaded), logits(policy))


@pytest.mark.parametrize("settings", [MODULES, EMBEDDINGS])
@pytest.mark.parametrize("restore", [materialise, become])
def test_modules_that_train_whole_and_embeddings_are_merged_too(
    restore: Callable[..., Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    # a rank that holds the merge of three: what it becomes loses nothing either
    policy = factors_and_more(r=2 if restore is materialise else 24, **settings)
    store = adapter_trajectory(policy, tmp_path)
    restore(policy, store, MERGE)
    states = dense_states(store)
    expected = dense_logits(linear_merge(states, torch.tensor(WEIGHTS)))
    torch.testing.assert_close(logits(policy), expected, atol=2e-5, rtol=1e-5)
    assert (dense_logits(states[2]) - expected).abs().max() > 0.1


@pytest.mark.parametrize("merge", [materialise, become])
def test_several_adapters_with_magnitudes_are_not_merged(
    merge: Callable[..., Any], tmp_path: Path
) -> None:
    policy = factors_and_more(**MAGNITUDES)
    store = adapter_trajectory(policy, tmp_path)
    with pytest.raises(InputError, match=r"use_dora is no adapter; set lora.use_dora false, or"):
        merge(policy, store, MERGE)
    assert not is_mergeable(policy)
    assert is_mergeable(adapted())
    assert is_mergeable(tiny_llama())


@pytest.mark.parametrize(("rank", "expected_rank"), [(None, 2), (1, 1), (3, 3), (6, 6), (9, 9)])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 8}}])
def test_a_merge_cut_to_a_rank_is_the_best_of_that_rank(
    settings: dict[str, Any], rank: int | None, expected_rank: int, tmp_path: Path
) -> None:
    policy = adapted(**settings)
    store = adapter_trajectory(policy, tmp_path)
    error = materialise_cut(policy, store, MERGE, rank)
    assert policy.active_adapter == "cut"
    found = {n: p for n, p in policy.named_parameters() if "lora_A.cut" in n}
    assert all(len(p) == expected_rank for p in found.values())

    start, merged = base_of(tiny_llama), linear_merge(dense_states(store), torch.tensor(WEIGHTS))
    lost = total = 0.0
    expected = {}
    for name in found:
        plain = name.removeprefix("base_model.model.").replace(".lora_A.cut", "")
        before = start.get_parameter(plain).detach().double()
        change = merged[plain].detach().double() - before
        left, singular, right = torch.linalg.svd(change, full_matrices=False)
        best = (left * singular)[:, :expected_rank] @ right[:expected_rank]
        expected[plain] = (before + best).float()
        lost += float(singular[expected_rank:].square().sum())
        total += float(singular.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    # the merge of three adapters of rank 2 has rank 6
    assert (error < 1e-6) == (expected_rank >= 6)
    torch.testing.assert_close(logits(policy), dense_logits(expected), atol=2e-6, rtol=1e-5)


def test_a_cut_leaves_no_trace(tmp_path: Path) -> None:
    policy = adapted()
    store = adapter_trajectory(policy, tmp_path)
    names = [name for name, _ in policy.named_parameters()]
    for recipe in (MERGE, Recipe("last", (1,))):
        materialise_cut(policy, store, recipe, 1)
        materialise(policy, store, Recipe("last", (2,)))
        assert list(policy.peft_config) == ["default"]
        assert [name for name, _ in policy.named_parameters()] == names
    assert materialise_cut(policy, store, Recipe("last", (1,)), None) == 0.0
    assert policy.active_adapter == "default"


def test_an_adapter_of_another_rank_is_no_snapshot_of_the_policy(tmp_path: Path) -> None:
    store = adapter_trajectory(adapted(rank=3), tmp_path)
    with pytest.raises(
        InputError, match=r"does not fit the policy: round 0: tensor .*lora_A.* has"
    ):
        materialise(adapted(rank=2), store, Recipe("last", (0,)))
