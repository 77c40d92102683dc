from __future__ import annotations

from collections.abc import Callable, Sequence
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
from tpmm_pl.data.batching import collate
from tpmm_pl.logps import sequence_logps
from tpmm_pl.losses import per_token
from tpmm_pl.models import scoring
from tpmm_pl.models.scoring import (
    PairScorer,
    length_groups,
    on_device,
    pair_tokens,
    score_completions,
    score_pairs,
)
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
    ours, expected = PairScorer(model)(collate(pairs(), PAD)), naive(model, pairs())
    assert_near(ours, expected)
    assert ours.chosen.std() > 0.1
    through_ours, through_theirs = gradients(model, ours), gradients(model, expected)
    assert through_ours
    assert list(through_ours) == list(through_theirs)
    for name, gradient in through_theirs.items():
        torch.testing.assert_close(through_ours[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def positions_of_head(model: nn.Module) -> int:
    """Count the positions that the head is applied to."""
    seen: list[int] = []
    inner: Any = model
    head = inner.get_output_embeddings()
    scorer = PairScorer(model)
    head.register_forward_hook(lambda *call: seen.append(call[2].shape[:-1].numel()))
    scorer(collate(pairs(), PAD))
    return sum(seen)


@compact_models
def test_the_head_sees_completion_positions_only(factory: Factory) -> None:
    completion = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs())
    assert positions_of_head(factory()) == completion


@whole_models
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_models_that_treat_logits_further_go_through_their_own_forward(
    factory: Callable[[float], nn.Module], factor: float
) -> None:
    model = factory(factor)
    assert PairScorer(model)._parts is None
    assert_near(PairScorer(model)(collate(pairs(), PAD)), naive(model, pairs()))


@all_models
def test_making_a_scorer_leaves_the_mode_and_the_gradients(factory: Factory) -> None:
    for training in (True, False):
        model = factory().train(training)
        PairScorer(model)
        assert all(module.training == training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("factory", [llama, gpt2, adapted, soft_capped])
def test_the_batch_size_and_the_order_of_pairs_change_nothing(factory: Factory) -> None:
    model, made = factory(), pairs()
    expected = naive(model, made)
    for batch_size in (1, 2, 4, 100):
        logps = score_pairs(model, made, pad_id=PAD, batch_size=batch_size)
        assert_near(logps, expected)
        assert not logps.chosen.requires_grad
    backwards = score_pairs(model, made[::-1], pad_id=PAD, batch_size=2)
    assert_near(PairLogps(*(values.flip(0) for values in backwards)), expected)


def test_what_fills_the_rows_changes_nothing() -> None:
    one, other = (PairScorer(llama())(collate(pairs(), pad_id)) for pad_id in (PAD, 17))
    assert_near(one, other, tolerance=0)


def test_completions_score_as_pairs_do() -> None:
    model, made = llama(), pairs()
    completions = [
        Completion(Prompt(pair.prompt_id, "", pair.prompt_ids), index, tokens, "", True, 0.0)
        for pair in made
        for index, tokens in enumerate((pair.chosen_ids, pair.rejected_ids))
    ]
    expected = score_pairs(model, made, pad_id=PAD, batch_size=4)
    for batch_size in (1, 5, 256):
        logps = score_completions(model, completions, pad_id=PAD, batch_size=batch_size)
        assert logps.shape == (18,)
        assert_near(PairLogps(logps[0::2], logps[1::2]), expected)


def test_nothing_to_score_gives_nothing() -> None:
    model = llama()
    assert score_completions(model, [], pad_id=PAD).shape == (0,)
    assert score_pairs(model, [], pad_id=PAD, batch_size=4).chosen.shape == (0,)


def test_tokens_are_those_of_the_completions() -> None:
    batch = collate(pairs(), PAD)
    tokens = pair_tokens(batch)
    assert tokens.chosen.tolist() == [len(pair.chosen_ids) for pair in pairs()]
    assert tokens.rejected.tolist() == [len(pair.rejected_ids) for pair in pairs()]
    mean = per_token(PairLogps(-2 * tokens.chosen, -3 * tokens.rejected), tokens)
    assert mean.chosen.tolist() == [-2.0] * 9
    assert mean.rejected.tolist() == [-3.0] * 9


def mask_of(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "lengths", [[5], [3, 9], [4, 4, 4, 4], [1, 2, 3, 4, 50], [9, 1, 8, 2, 7, 3, 6, 4, 5], [30, 1]]
)
def test_length_groups_hold_every_row_once_and_whole(lengths: list[int]) -> None:
    groups = length_groups(mask_of(lengths))
    rows = torch.cat([rows for rows, _ in groups]).tolist()
    assert sorted(rows) == list(range(len(lengths)))
    for members, width in groups:
        assert width == max(lengths[row] for row in members.tolist())


def test_rows_of_one_length_stay_one_group_and_others_are_cut() -> None:
    assert len(length_groups(mask_of([7] * 8))) == 1
    assert len(length_groups(mask_of([1, 1, 1, 1, 1, 1, 50, 50]))) == 4


def test_scores_come_in_the_order_of_the_rows_when_they_are_cut_into_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = llama(), collate(pairs(), PAD)
    assert len(length_groups(batch.attention_mask)) > 1
    cut = PairScorer(model)(batch)
    monkeypatch.setattr(
        scoring, "length_groups", lambda mask: [(torch.arange(len(mask)), mask.shape[1])]
    )
    assert_near(cut, PairScorer(model)(batch))


def test_a_moved_batch_is_the_same_batch() -> None:
    batch = collate(pairs(), PAD)
    moved = on_device(batch, torch.device("meta"))
    assert moved.input_ids.device == moved.reference.rejected.device == torch.device("meta")
    assert torch.equal(on_device(batch, torch.device("cpu")).labels, batch.labels)
