from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

from tests.models.tiny import EOS, PAD, tiny_gpt2, tiny_llama
from tpmm_pl import logps
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pair_rows
from tpmm_pl.logps import sequence_logps
from tpmm_pl.losses import per_token
from tpmm_pl.models import scoring
from tpmm_pl.models.scoring import PairScorer, pair_tokens, score_completions, score_pairs
from tpmm_pl.types import Completion, Pair, PairLogps, Prompt


def scaled(model: PreTrainedModel, factor: float = 3.0) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data *= factor
    model.eval()
    return model


def llama() -> nn.Module:
    return scaled(tiny_llama())


def gpt2() -> nn.Module:
    return scaled(tiny_gpt2())


def adapted() -> nn.Module:
    torch.manual_seed(1)
    settings = LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(scaled(tiny_llama()), settings)


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def soft_capped(factor: float = 3.0) -> nn.Module:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)
    return scaled(Gemma2ForCausalLM(config), factor)


def scaled_logits(factor: float = 3.0) -> nn.Module:
    torch.manual_seed(0)
    return scaled(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)), factor)


Factory = Callable[[], nn.Module]
compact_models = pytest.mark.parametrize("factory", [llama, gpt2, adapted])
whole_models = pytest.mark.parametrize("factory", [soft_capped, scaled_logits])
all_models = pytest.mark.parametrize("factory", [llama, gpt2, adapted, soft_capped, scaled_logits])


def pairs(count: int = 9) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 32, (length,), generator=generator).tolist())

    return [
        Pair(
            f"p{index}",
            "",
            "",
            "",
            prompt_ids=tokens(1 + index % 4),
            chosen_ids=(*tokens(1 + 3 * index % 7), EOS),
            rejected_ids=(*tokens(1 + 5 * index % 6), EOS),
        )
        for index in range(count)
    ]


def naive(model: nn.Module, made: Sequence[Pair]) -> PairLogps:
    """One unpadded row at a time through the model's own forward."""

    def of(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits
        labels = torch.tensor([[*[-100] * len(prompt), *completion]])
        return sequence_logps(logits, labels)[0]

    return PairLogps(
        torch.stack([of(pair.prompt_ids, pair.chosen_ids) for pair in made]),
        torch.stack([of(pair.prompt_ids, pair.rejected_ids) for pair in made]),
    )


def assert_near(ours: PairLogps, expected: PairLogps, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def gradients(model: nn.Module, logps: PairLogps) -> dict[str, Tensor]:
    model.zero_grad()
    (logps.chosen - 0.5 * logps.rejected).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@all_models
def test_the_scores_and_gradients_are_those_of_the_models_own_forward(factory: Factory) -> None:
    model = factory()
    ours, expected = PairScorer(model)(collate(pairs())), naive(model, pairs())
    assert_near(ours, expected)
    assert ours.chosen.std() > 0.1
    through_ours, through_theirs = gradients(model, ours), gradients(model, expected)
    assert through_ours
    assert list(through_ours) == list(through_theirs)
    for name, gradient in through_theirs.items():
        torch.testing.assert_close(through_ours[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def positions_of_head(model: nn.Module, monkeypatch: pytest.MonkeyPatch, packs: bool) -> int:
    """Count the positions that the head is applied to."""
    seen: list[int] = []
    apply = logps.head_logps

    def counted(hidden: Tensor, *others: Any) -> Tensor:
        seen.append(hidden.shape[:-1].numel())
        return apply(hidden, *others)

    monkeypatch.setattr(scoring, "head_logps", counted)
    scorer = PairScorer(model)
    scorer._pass.packs = packs
    scorer(collate(pairs()))
    return sum(seen)


@compact_models
def test_the_head_sees_completion_positions_only(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs())
    assert positions_of_head(factory(), monkeypatch, packs=False) == completion
    # in a tree, what several completions begin with predicts their next tokens at once
    beginnings = {
        (*prompt, *ids[:end]) for prompt, ids in pair_rows(pairs()) for end in range(len(ids))
    }
    assert positions_of_head(factory(), monkeypatch, packs=True) == len(beginnings) < completion


@whole_models
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_models_that_treat_logits_further_go_through_their_own_forward(
    factory: Callable[[float], nn.Module], factor: float
) -> None:
    model = factory(factor)
    assert PairScorer(model)._parts is None
    assert_near(PairScorer(model)(collate(pairs())), naive(model, pairs()))


@all_models
def test_making_a_scorer_leaves_the_mode_and_the_gradients(factory: Factory) -> None:
    for training in (True, False):
        model = factory().train(training)
        PairScorer(model)
        assert all(module.training == training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("factory", [llama, gpt2, adapted, soft_capped])
def test_the_token_budget_and_the_order_of_pairs_change_nothing(factory: Factory) -> None:
    # pairs of one prompt go into one batch wherever they stand
    model, made = factory(), [*pairs(), replace(pairs()[1], chosen_ids=(9, 10, EOS))]
    expected = naive(model, made)
    for token_budget in (1, 20, 40, 1000):
        logps = score_pairs(model, made, token_budget=token_budget)
        assert_near(logps, expected)
        assert not logps.chosen.requires_grad
    backwards = score_pairs(model, made[::-1], token_budget=20)
    assert_near(PairLogps(*(values.flip(0) for values in backwards)), expected)


def test_completions_score_as_pairs_do() -> None:
    model, made = llama(), pairs()
    completions = [
        Completion(Prompt(pair.prompt_id, "", pair.prompt_ids), index, tokens, "", True, 0.0)
        for pair in made
        for index, tokens in enumerate((pair.chosen_ids, pair.rejected_ids))
    ]
    expected = score_pairs(model, made, token_budget=40)
    for token_budget in (1, 30, 4096):
        logps = score_completions(model, completions, token_budget=token_budget)
        assert logps.shape == (18,)
        assert_near(PairLogps(logps[0::2], logps[1::2]), expected)


def test_nothing_to_score_gives_nothing() -> None:
    model = llama()
    assert score_completions(model, []).shape == (0,)
    assert score_pairs(model, []).chosen.shape == (0,)


def test_tokens_are_those_of_the_completions() -> None:
    tokens = pair_tokens(collate(pairs()))
    assert tokens.chosen.tolist() == [len(pair.chosen_ids) for pair in pairs()]
    assert tokens.rejected.tolist() == [len(pair.rejected_ids) for pair in pairs()]
    mean = per_token(PairLogps(-2 * tokens.chosen, -3 * tokens.rejected), tokens)
    assert mean.chosen.tolist() == [-2.0] * 9
    assert mean.rejected.tolist() == [-3.0] * 9


def test_sums_are_kept_in_float32_whatever_the_default_is() -> None:
    model, prompt = tiny_llama().bfloat16(), Prompt("p", "", (5, 6))
    pairs = [Pair("p", "", "", "", (5, 6), (7,) * 20, (8, 9))]
    expected = torch.stack(score_pairs(model, pairs)).flatten()
    torch.set_default_dtype(torch.bfloat16)  # as a fit in bf16-true does
    try:
        found = torch.stack(score_pairs(model, pairs)).flatten()
        answers = [Completion(prompt, 0, p, "", True, 0.0) for p in ((7,) * 20, (8, 9))]
        sampled = score_completions(model, answers)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected.dtype == found.dtype == sampled.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(sampled, expected)
