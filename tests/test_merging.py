from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama
from tpmm_pl import merging
from tpmm_pl.merging import (
    assign_groups,
    check_grouping,
    grouped_merge,
    linear_merge,
    slerp_coefficients,
    weighted_sum,
)
from tpmm_pl.types import InputError, StateDict

Factory = Callable[..., PreTrainedModel]
both_models = pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])


def states(factory: Factory, count: int = 3) -> list[StateDict]:
    return [dict(factory(seed=seed).named_parameters()) for seed in range(count)]


def assert_same(merged: StateDict, expected: StateDict, tolerance: float = 0.0) -> None:
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor.detach(), atol=tolerance, rtol=0, msg=name)


@both_models
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_one_hot_weights_return_a_state_bit_for_bit(factory: Factory, kept: int) -> None:
    sources = states(factory)
    assert_same(linear_merge(sources, torch.eye(3)[kept]), sources[kept])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_weights_keep_every_bit_of_every_dtype(dtype: torch.dtype) -> None:
    source = torch.tensor([-0.0, 0.0, 1 / 3, -1e-7, 6e4, float("inf")], dtype=dtype)
    other = torch.full_like(source, float("nan"))
    merged = linear_merge([{"w": other}, {"w": source}], torch.tensor([0.0, 1.0]))["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, source)
    assert torch.equal(merged.signbit(), source.signbit())


@both_models
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1 / 3, 1 / 3, 1 / 3), (1.7, -0.9, 0.2)])
def test_merging_identical_states_is_the_identity(
    factory: Factory, weights: tuple[float, ...]
) -> None:
    source = states(factory, 1)[0]
    assert_same(linear_merge([source] * 3, torch.tensor(weights)), source, tolerance=1e-6)


@both_models
def test_permuting_states_with_their_weights_changes_nothing(factory: Factory) -> None:
    a, b, c = states(factory)
    merged = linear_merge([a, b, c], torch.tensor([0.2, 0.3, 0.5]))
    assert_same(linear_merge([c, a, b], torch.tensor([0.5, 0.2, 0.3])), merged, tolerance=1e-6)


def test_a_merge_by_hand() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
    assert linear_merge([a, b], torch.tensor([0.25, 0.75]))["w"].tolist() == [2.5, -1.0]
    # used as given: no normalisation
    assert linear_merge([a, b], torch.tensor([1.0, 1.0]))["w"].tolist() == [4.0, 0.0]


@both_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_agrees_with_mergekit(factory: Factory, dtype: torch.dtype) -> None:
    from mergekit.merge_methods import merge_state_dicts

    sources = [{n: t.detach().to(dtype) for n, t in s.items()} for s in states(factory)]
    weights = [0.2, 0.3, 0.5]
    theirs = merge_state_dicts(sources, "linear", parameters={"weight": weights})
    # both sum in float32: in bfloat16 they round the same number
    assert_same(linear_merge(sources, torch.tensor(weights)), theirs, tolerance=1e-6)


def test_the_sum_runs_in_float32_whatever_the_dtype() -> None:
    # in bfloat16 256 + 1 is 256: three ones beside it would be lost
    sources = [{"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (256.0, 1.0, 1.0, 1.0, 1.0)]
    assert linear_merge(sources, torch.ones(5))["w"].item() == 260


def test_float64_states_are_merged_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 100, dtype=torch.float64, generator=generator)
    merged = linear_merge([{"w": a}, {"w": b}], torch.tensor([0.25, 0.75]))["w"]
    torch.testing.assert_close(merged, 0.25 * a + 0.75 * b, atol=1e-15, rtol=0)


def test_tensors_larger_than_a_chunk_are_merged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, 9, generator=generator)
    merged = weighted_sum([a, b.T.contiguous().T], [0.25, 0.75], torch.empty(5, 9))
    torch.testing.assert_close(merged, 0.25 * a + 0.75 * b)


def test_no_weight_at_all_is_zero() -> None:
    merged = weighted_sum([torch.ones(3)] * 2, [0.0, 0.0], torch.full((3,), float("nan")))
    assert merged.tolist() == [0.0, 0.0, 0.0]


def test_integers_are_those_of_the_last_state() -> None:
    a = {"w": torch.zeros(1), "steps": torch.tensor([1])}
    b = {"w": torch.ones(1), "steps": torch.tensor([2])}
    merged = linear_merge([a, b], torch.tensor([0.9, 0.1]))
    assert merged["steps"].tolist() == [2]
    merged["steps"] += 1
    assert b["steps"].tolist() == [2]


def test_every_group_uses_its_own_row() -> None:
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([1.0])}
    b = {"x": torch.tensor([3.0]), "y": torch.tensor([3.0])}
    merged = grouped_merge([a, b], torch.tensor([[1.0, 0.0], [0.5, 0.5]]), {"x": 0, "y": 1})
    assert {name: tensor.item() for name, tensor in merged.items()} == {"x": 1.0, "y": 2.0}


def test_states_that_do_not_fit_are_refused() -> None:
    one, half = {"w": torch.zeros(2)}, torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"1 states but weights of shape \(2,\)"):
        linear_merge([one], half)
    with pytest.raises(ValueError, match=r"0 states but weights of shape \(0,\)"):
        linear_merge([], torch.zeros(0))
    with pytest.raises(ValueError, match=r"state 0 lacks tensor v \(1 names differ\)"):
        linear_merge([one, {**one, "v": torch.zeros(1)}], half)
    with pytest.raises(ValueError, match="state 0 has an extra tensor v"):
        linear_merge([{**one, "v": torch.zeros(1)}, one], half)
    with pytest.raises(ValueError, match=r"state 0: tensor w has shape \(3,\), not \(2,\)"):
        linear_merge([{"w": torch.zeros(3)}, one], half)


GROUPS = {
    "model": {"model": 21},
    # embedding; 4 projections of attention, 3 of the MLP, 2 norms; final norm and head
    "layer": {"embeddings": 1, "layer_00": 9, "layer_01": 9, "head": 2},
    "block": {
        "embeddings": 1,
        "layer_00_attention": 5,
        "layer_00_mlp": 4,
        "layer_01_attention": 5,
        "layer_01_mlp": 4,
        "head": 2,
    },
}
GPT2_GROUPS = {
    "model": {"model": 28},
    # token and position embeddings; 2 norms and 4 projections with biases; the final norm, as
    # the head is the token embedding
    "layer": {"embeddings": 2, "layer_00": 12, "layer_01": 12, "head": 2},
    "block": {
        "embeddings": 2,
        "layer_00_attention": 6,
        "layer_00_mlp": 6,
        "layer_01_attention": 6,
        "layer_01_mlp": 6,
        "head": 2,
    },
}


@pytest.mark.parametrize(("factory", "expected"), [(tiny_llama, GROUPS), (tiny_gpt2, GPT2_GROUPS)])
@pytest.mark.parametrize("grouping", ["model", "layer", "block"])
def test_every_parameter_is_in_the_group_worked_out_by_hand(
    factory: Factory, expected: dict[str, dict[str, int]], grouping: str
) -> None:
    names = [name for name, _ in factory().named_parameters()]
    groups, group_of = assign_groups(names, grouping)
    assert list(group_of) == names
    assert groups == tuple(expected[grouping])
    assert Counter(groups[row] for row in group_of.values()) == expected[grouping]


@both_models
def test_in_the_finest_grouping_every_parameter_is_a_group(factory: Factory) -> None:
    names = [name for name, _ in factory().named_parameters()]
    groups, group_of = assign_groups(names, "tensor")
    assert groups == tuple(names)
    assert list(group_of.values()) == list(range(len(names)))


def test_attention_takes_the_norm_before_it() -> None:
    names = [name for name, _ in tiny_llama().named_parameters()]
    groups, group_of = assign_groups(names, "block")
    first = "model.layers.1."
    of = {name: groups[row] for name, row in group_of.items()}
    assert of[first + "input_layernorm.weight"] == of[first + "self_attn.q_proj.weight"]
    assert of[first + "post_attention_layernorm.weight"] == of[first + "mlp.up_proj.weight"]
    assert of["lm_head.weight"] == of["model.norm.weight"] == "head"


def test_layers_beyond_the_tenth_keep_their_order() -> None:
    names = [f"model.layers.{index}.w" for index in range(12)]
    groups, _ = assign_groups(["model.embed.w", *names, "head.w"], "layer")
    assert groups == ("embeddings", *(f"layer_{index:02d}" for index in range(12)), "head")
    assert list(groups[1:-1]) == sorted(groups[1:-1])


def test_an_unknown_grouping_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown group 'layers'; did you mean layer"):
        check_grouping("layers")
    with pytest.raises(InputError, match="unknown group"):
        assign_groups(["w"], "layers")


def test_a_divided_sum_is_the_sum_divided() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    found = weighted_sum(tensors, [2.0, 3.0], torch.empty(2), divisor=5.0)
    # 11 / 5, 22 / 5
    assert torch.equal(found, torch.tensor([2.2, 4.4]))


def test_half_of_a_right_angle_weighs_both_by_its_sine() -> None:
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    assert slerp_coefficients(first, second, 0.5) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert slerp_coefficients(first, second, 1 / 3) == pytest.approx((0.75**0.5, 0.5))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_the_arc_are_the_tensors(t: float) -> None:
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert slerp_coefficients(first, second, t) == (1 - t, t)


def test_the_arc_between_tensors_of_one_length_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK", 7)
    first, second = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double()
    first, second = first / first.norm(), second / second.norm()
    for t in (0.1, 0.7):
        a, b = slerp_coefficients(first, second, t)
        assert float((a * first + b * second).norm()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0001, -2.0, 0.0])
def test_tensors_in_one_line_are_merged_along_it(scale: float) -> None:
    first = torch.tensor([1.0, 2.0])
    assert slerp_coefficients(first, scale * first, 0.25) == (0.75, 0.25)
