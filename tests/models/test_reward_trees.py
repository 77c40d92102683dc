"""Rows scored as branches of one tree: what they begin with alike is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tests.models.families import CONFIGS, PAIRS, config_of, family_reward, gradient_of, relative
from tests.models.tiny import EOS
from tests.moe.rewards import reward_model, seeded
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pair_rows
from tpmm_pl.models.reward import RewardScorer, score_rows
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings, Routing, balance_loss, recorded_routing

TREE = collate(PAIRS).tree
ROWS = [(*prompt, *ids) for prompt, ids in pair_rows(PAIRS)]
PROMPT = (*range(2, 14), 2, 3, 4)
COMPLETIONS = [(20 + k, *range(6, 8 + k), EOS) for k in range(8)]
K_ROWS = [(*PROMPT, *completion) for completion in COMPLETIONS]
REWARDED = [
    family
    for family in CONFIGS
    if type(config_of(family)) in AutoModelForSequenceClassification._model_mapping
]


def one_by_one(model: nn.Module, rows: list[tuple[int, ...]]) -> Tensor:
    """Score each row by the model's own forward, without any padding."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-6)


def test_most_families_have_reward_models() -> None:
    assert len(REWARDED) >= 10
    assert {"Llama", "Mistral", "Gemma2", "GPT2"} <= set(REWARDED)


@pytest.mark.parametrize("family", REWARDED)
def test_branch_ends_score_as_rows_alone(family: str) -> None:
    model = family_reward(family)
    scorer = RewardScorer(model)
    assert scorer.packs
    found, expected = scorer.rows(TREE), one_by_one(model, ROWS)
    assert expected.std() > 0.05
    close(found, expected, 5e-6)
    weights = torch.linspace(-1, 1, len(ROWS))
    gradients = [gradient_of(model, (weights * rows).sum()) for rows in (found, expected)]
    assert relative(*gradients) < 1e-5


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Note how many tokens each forward pass takes."""
    seen: list[int] = []
    embedding: nn.Module = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    yield seen
    hook.remove()


def test_eight_completions_of_a_prompt_pay_for_it_once() -> None:
    model = family_reward("Llama")
    scorer = RewardScorer(model)
    with passes(model) as seen:
        found = score_rows(scorer, K_ROWS)
    assert seen == [len(PROMPT) + sum(map(len, COMPLETIONS))]
    assert seen == [15 + 60]
    longest = max(map(len, K_ROWS))
    assert 8 * longest > 2.5 * seen[0]
    with torch.no_grad():
        close(found, one_by_one(model, K_ROWS))


@pytest.mark.parametrize(
    ("budget", "tokens"), [(75, [75]), (74, [64, 26]), (45, [45, 45]), (1, None)]
)
def test_a_budget_counts_what_rows_begin_with_alike_once(
    budget: int, tokens: list[int] | None
) -> None:
    model = family_reward("Llama")
    scorer = RewardScorer(model)
    expected = score_rows(scorer, K_ROWS)
    with passes(model) as seen:
        found = score_rows(scorer, K_ROWS[::-1], token_budget=budget)
    assert seen == (tokens or [len(row) for row in K_ROWS])
    close(found.flip(0), expected)


def test_rows_given_twice_are_computed_once() -> None:
    model = family_reward("Llama")
    scorer = RewardScorer(model)
    with passes(model) as seen:
        found = score_rows(scorer, [K_ROWS[3], K_ROWS[0], K_ROWS[3], K_ROWS[3][:-2]])
    assert seen == [15 + 4 + 7]
    assert found[0] == found[2]
    with torch.no_grad():
        close(found, one_by_one(model, [K_ROWS[3], K_ROWS[0], K_ROWS[3], K_ROWS[3][:-2]]))


def mixture(name: str) -> PreTrainedModel:
    model = reward_model(name)
    upcycle(model, MoESettings(5, 3, 1, noise=False), generator=seeded())
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=seeded(number)), alpha=0.2)
    model.train()
    return model


def routed(model: nn.Module, scorer: RewardScorer) -> tuple[Tensor, dict[str, Routing]]:
    with recorded_routing(model, scorer.seen(TREE)) as routings:
        rows = scorer.rows(TREE)
    return rows, routings


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_packed_and_padded_rows_route_alike(name: str) -> None:
    model = mixture(name)
    packed, padded = RewardScorer(model), RewardScorer(model)
    assert packed.packs
    assert padded._pass is not None
    padded._pass.packs = False
    ours, theirs = routed(model, packed), routed(model, padded)
    close(ours[0], theirs[0])
    assert len(ours[1]) == len(moe_layers(model)) == 2
    for layer, expected in theirs[1].items():
        found = ours[1][layer]
        assert expected.tokens == sum(map(len, ROWS))
        assert expected.counts.min() < expected.counts.max()
        for part in ("tokens", "counts"):
            assert torch.equal(getattr(found, part), getattr(expected, part)), part
        for part in ("importance", "load", "gate_entropy", "weight"):
            torch.testing.assert_close(
                getattr(found, part), getattr(expected, part), atol=1e-5, rtol=1e-6, msg=part
            )
    gradients = [
        gradient_of(model, torch.stack([balance_loss(r) for r in routings.values()]).sum())
        for _, routings in (ours, theirs)
    ]
    assert relative(*gradients) < 1e-5
