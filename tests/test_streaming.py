from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tests.models.tiny import EOS, PAD, tiny_gpt2, tiny_llama
from tpmm_pl import streaming
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pad_tree, pair_rows
from tpmm_pl.logps import sequence_logps
from tpmm_pl.merging import assign_groups, linear_merge
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.modules.fusion import FusionSettings, FusionWeights
from tpmm_pl.streaming import StreamedMerge, difference_dots
from tpmm_pl.types import IGNORE_INDEX, Pair, StateDict

Factory = Callable[..., PreTrainedModel]
both_models = pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])

PAIRS = [
    Pair("a", "", "", "", (6, 7, 8), (9, 10, EOS), (11, EOS)),
    Pair("b", "", "", "", (12, 6), (13, 14, 15, EOS), (17, 18, EOS)),
]
BATCH = collate(PAIRS)
IDS, MASK = pad_tree(BATCH.tree, PAD)
LABELS = torch.full_like(IDS, IGNORE_INDEX)
for number, (prompt, completion) in enumerate(pair_rows(PAIRS)):
    LABELS[number, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
K = 3


def model_of(factory: Factory, seed: int = 0) -> PreTrainedModel:
    model = factory(seed=seed)
    model.eval()
    # weights of a size at which the model is far from linear
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def sources_of(factory: Factory) -> list[dict[str, Tensor]]:
    return [
        {name: p.detach() for name, p in model_of(factory, seed).named_parameters()}
        for seed in range(1, K + 1)
    ]


def streamed(
    model: nn.Module, sources: list[dict[str, Tensor]], grouping: str
) -> tuple[StreamedMerge, dict[str, int]]:
    parameters = dict(model.named_parameters())
    groups, group_of = assign_groups(parameters, grouping)
    return StreamedMerge(parameters, sources, group_of, len(groups)), group_of


def constrained(weights: Tensor, constraint: str) -> Tensor:
    settings = FusionSettings(constraint="simplex" if constraint == "simplex" else "affine")
    module = FusionWeights(settings)
    module.__dict__["weights"] = weights
    return module.coefficients()


def loss_of(model: nn.Module) -> Tensor:
    logps = PairScorer(model)(BATCH)
    return -nn.functional.logsigmoid(logps.chosen - logps.rejected).mean()


def loss_through_copies(
    model: nn.Module,
    sources: list[dict[str, Tensor]],
    coefficients: Tensor,
    group_of: Mapping[str, int],
) -> Tensor:
    """All K copies in the graph, in float64."""
    merged = {
        name: sum(
            c * source[name].double() for c, source in zip(coefficients[row], sources, strict=True)
        )
        for name, row in group_of.items()
    }
    inputs = {"attention_mask": MASK, "use_cache": False}
    logits = functional_call(model, merged, (IDS,), inputs).logits
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, LABELS[:, 1:, None].clamp(min=0))
    rows = (picked.squeeze(-1) * (LABELS[:, 1:] >= 0)).sum(-1)
    chosen, rejected = rows.chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def start_weights(groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(groups, K, dtype=torch.float64, generator=generator)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@both_models
@pytest.mark.parametrize("grouping", ["model", "layer", "block", "tensor"])
@pytest.mark.parametrize("constraint", ["simplex", "affine"])
def test_the_streamed_gradient_equals_autograd_through_all_copies_and_finite_differences(
    factory: Factory, grouping: str, constraint: str
) -> None:
    model, sources = model_of(factory), sources_of(factory)
    merge, group_of = streamed(model, sources, grouping)
    weights = start_weights(merge.groups).requires_grad_()

    coefficients = constrained(weights, constraint)
    merge.write(coefficients)
    with merge.gradient() as gradient:
        loss = loss_of(model)
        loss.backward()
    (ours,) = torch.autograd.grad(coefficients, weights, gradient)

    oracle = model_of(factory).double()
    through = loss_through_copies(oracle, sources, constrained(weights, constraint), group_of)
    (expected,) = torch.autograd.grad(through, weights)
    assert loss.item() == pytest.approx(through.item(), rel=1e-5)
    assert expected.norm() > 1e-3
    assert relative(ours, expected) < 1e-5

    # along three random directions rather than each of up to 84 numbers
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        direction = torch.randn(weights.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            up, down = (
                loss_through_copies(
                    oracle, sources, constrained(weights + step * direction, constraint), group_of
                )
                for step in (1e-3, -1e-3)
            )
        # a model in float64 still normalises in float32: a smaller step would measure its rounding
        slope = float((up - down) / 2e-3)
        assert float((ours * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-3)


@both_models
@pytest.mark.parametrize("kept", range(K))
def test_one_hot_coefficients_write_a_source_bit_for_bit(factory: Factory, kept: int) -> None:
    model, sources = model_of(factory), sources_of(factory)
    merge, _ = streamed(model, sources, "layer")
    merge.write(torch.eye(K)[kept].expand(merge.groups, K))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, sources[kept][name]), name


@both_models
def test_the_written_merge_is_the_linear_merge(factory: Factory) -> None:
    model, sources = model_of(factory), sources_of(factory)
    merge, _ = streamed(model, sources, "model")
    weights = torch.tensor([0.2, 0.3, 0.5])
    merge.write(weights[None])
    for name, tensor in linear_merge(sources, weights).items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_tied_embeddings_stay_tied_and_add_the_gradients_of_both_uses() -> None:
    model, sources = model_of(tiny_gpt2), sources_of(tiny_gpt2)
    merge, _ = streamed(model, sources, "tensor")
    assert "lm_head.weight" not in merge.parameters
    merge.write(torch.full((merge.groups, K), 1 / K))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with merge.gradient() as gradient:
        loss_of(model).backward()
    plain = model_of(tiny_gpt2)
    plain.load_state_dict({n: p.detach() for n, p in model.named_parameters()}, strict=False)
    loss_of(plain).backward()
    grad = plain.get_input_embeddings().weight.grad
    assert isinstance(grad, Tensor)
    name = "transformer.wte.weight"
    expected = [float((grad * (s[name] - sources[0][name])).sum()) for s in sources]
    assert gradient[0].tolist() == pytest.approx(expected, rel=1e-4)


@both_models
def test_parameters_keep_no_gradient_and_their_own_switch(factory: Factory) -> None:
    model = model_of(factory)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    merge, _ = streamed(model, sources_of(factory), "model")
    merge.write(torch.full((1, K), 1 / K))
    with merge.gradient() as gradient:
        loss_of(model).backward()
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not frozen.requires_grad
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p is not frozen)


def test_gradients_left_over_from_training_do_not_count() -> None:
    results = []
    for stale in (False, True):
        model = model_of(tiny_llama)
        merge, _ = streamed(model, sources_of(tiny_llama), "model")
        merge.write(torch.full((1, K), 1 / K))
        if stale:
            loss_of(model).mul(100).backward()
        with merge.gradient() as gradient:
            loss_of(model).backward()
        results.append(gradient)
    torch.testing.assert_close(results[1], results[0])


def test_several_backward_passes_accumulate() -> None:
    model = model_of(tiny_llama)
    merge, _ = streamed(model, sources_of(tiny_llama), "block")
    merge.write(torch.full((merge.groups, K), 1 / K))
    with merge.gradient() as once:
        loss_of(model).backward()
    with merge.gradient() as twice:
        loss_of(model).backward()
        loss_of(model).backward()
    torch.testing.assert_close(twice, 2 * once)


def test_an_error_inside_the_block_leaves_no_hook() -> None:
    model = model_of(tiny_llama)
    merge, _ = streamed(model, sources_of(tiny_llama), "model")
    with pytest.raises(ZeroDivisionError), merge.gradient():
        raise ZeroDivisionError
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_sources_are_summed_and_dotted_in_float32() -> None:
    model = model_of(tiny_llama)
    wide = sources_of(tiny_llama)
    narrow = [{name: t.bfloat16() for name, t in source.items()} for source in wide]
    same = [{name: t.float() for name, t in source.items()} for source in narrow]
    results = []
    for sources in (narrow, same):
        merge, _ = streamed(model, sources, "layer")
        merge.write(torch.full((merge.groups, K), 1 / K))
        written = {name: p.detach().clone() for name, p in model.named_parameters()}
        with merge.gradient() as gradient:
            loss_of(model).backward()
        results.append((written, gradient))
    assert results[0][0]["lm_head.weight"].dtype == torch.float32
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name])
    torch.testing.assert_close(results[0][1], results[1][1], atol=0, rtol=0)


def test_bfloat16_parameters_receive_the_merge_rounded_once() -> None:
    model, sources = model_of(tiny_llama).bfloat16(), sources_of(tiny_llama)
    merge, _ = streamed(model, sources, "model")
    weights = torch.tensor([0.2, 0.3, 0.5])
    merge.write(weights[None])
    for name, tensor in linear_merge(sources, weights).items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16())
    with merge.gradient() as gradient:
        sequence_logps(model(IDS).logits, LABELS).sum().backward()
    assert gradient.dtype == torch.float64
    assert gradient.isfinite().all()


def test_differences_lose_no_digits_where_sources_nearly_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 100 * torch.randn(1000, generator=generator)
    # exact in float32: a step far below the size of the weights
    near = base + 2.0**-10 * torch.randint(-3, 4, (1000,), generator=generator)
    gradient = torch.randn(1000, generator=generator)
    exact = torch.dot(gradient.double(), (near - base).double())
    dots = difference_dots(gradient, [base, near])
    assert dots[0] == 0
    assert dots[1].item() == pytest.approx(exact.item(), rel=1e-5)


def test_float64_gradients_are_dotted_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, a, b = torch.randn(3, 1000, dtype=torch.float64, generator=generator)
    dots = difference_dots(gradient, [a, b])
    assert dots[1].item() == pytest.approx(torch.dot(gradient, b - a).item(), rel=1e-12)


def test_tensors_larger_than_a_chunk_are_dotted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, a, b = torch.randn(3, 5, 9, generator=generator)
    whole = difference_dots(gradient, [a, b])
    monkeypatch.setattr(streaming, "CHUNK", 7)
    torch.testing.assert_close(difference_dots(gradient, [a, b]), whole)


def test_a_snapshot_that_does_not_fit_is_refused() -> None:
    model, sources = model_of(tiny_llama), sources_of(tiny_llama)
    wrong: StateDict = {**sources[1], "lm_head.weight": torch.zeros(32, 8)}
    parameters = dict(model.named_parameters())
    rows = dict.fromkeys(parameters, 0)
    message = r"source 1: tensor lm_head.weight has shape \(32, 8\), not \(32, 16\)"
    with pytest.raises(ValueError, match=message):
        StreamedMerge(parameters, [sources[0], wrong], rows, 1)
    with pytest.raises(ValueError, match=r"source 0 lacks tensor lm_head.weight"):
        StreamedMerge(parameters, [{n: sources[0][n] for n in rows if "lm" not in n}], rows, 1)


def test_what_a_snapshot_holds_beside_parameters_is_left_alone() -> None:
    model, sources = model_of(tiny_llama), sources_of(tiny_llama)
    merge, _ = streamed(model, [{**s, "steps": torch.tensor(3)} for s in sources], "model")
    merge.write(torch.eye(K)[:1])
    assert torch.equal(model.get_parameter("lm_head.weight"), sources[0]["lm_head.weight"])
