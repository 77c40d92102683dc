"""One optimizer step of several micro-batches against the plain mean over its pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers import PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_reward_model
from tests.modules.steps import (
    ONE_BY_ONE,
    PAIRS,
    POLICY,
    REWARD,
    SOME,
    WHOLE,
    fit,
    gradient_of,
    scored,
)
from tests.modules.twenty_steps import LargeStart
from tpmm_pl.data.batching import collate, micro_batches
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.reward import RewardModule, total_balance_loss
from tpmm_pl.moe.convert import upcycle
from tpmm_pl.moe.routing import MoESettings, Routing, recorded_routing
from tpmm_pl.types import Pair, PairBatch, PairLogps, Rewards, RunError

SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)

layouts = pytest.mark.parametrize("layout", ["packed", "padded"])
budgets = pytest.mark.parametrize("token_budget", [ONE_BY_ONE, SOME, WHOLE])


def policy(optimizer: Any = SGD, **settings: Any) -> DPOModule:
    return DPOModule(POLICY, optimizer, beta=0.5, **settings)


def row_logps(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """The model's own forward on one row, nothing shared and nothing padded."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    logp: Tensor = logps.gather(1, torch.tensor(completion)[:, None]).sum()
    return logp


def plain_mean(pairs: list[Pair]) -> tuple[Tensor, float]:
    """Gradient and value of the mean of w * -log sigmoid(beta * margin), row by row."""
    model, losses = POLICY.load_model(), []
    for p in pairs:
        margin = row_logps(model, p.prompt_ids, p.chosen_ids) - p.ref_chosen_logps
        margin = margin - row_logps(model, p.prompt_ids, p.rejected_ids) + p.ref_rejected_logps
        losses.append(-p.weight * F.logsigmoid(0.5 * margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    return gradient_of(model), float(loss.detach())


def assert_same(gradient: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert gradient.shape == expected.shape
    assert float((gradient - expected).norm()) <= tolerance * float(expected.norm())


def test_the_budgets_of_these_tests_cut_a_step_differently() -> None:
    cuts = [micro_batches(PAIRS, budget) for budget in (ONE_BY_ONE, SOME, WHOLE)]
    assert [[len(micro.weight) for micro in cut] for cut in cuts] == [[1] * 6, [3, 2, 1], [6]]


@layouts
@budgets
def test_the_gradient_of_a_step_is_that_of_the_mean_however_it_is_cut(
    layout: str, token_budget: int
) -> None:
    watch = fit(policy(), token_budget=token_budget, layout=layout)
    expected, loss = plain_mean(PAIRS)
    assert_same(watch.gradients[0], expected)
    assert watch.metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_weight_of_a_pair_counts_in_whatever_micro_batch_it_is() -> None:
    alone = [replace(p, weight=6.0 * (k == 3)) for k, p in enumerate(PAIRS)]
    watch = fit(policy(), alone, token_budget=SOME)
    expected, loss = plain_mean([replace(PAIRS[3], weight=1.0)])
    assert_same(watch.gradients[0], expected)
    assert watch.metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)


@layouts
@budgets
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_first_loss_is_log_2_in_every_layout(name: str, layout: str, token_budget: int) -> None:
    source = LargeStart(tiny_llama if name == "llama" else partial(tiny_gpt2, dropout=0.0))
    pairs = [replace(p, weight=1.0) for p in scored(source.load_model(), PAIRS)]
    watch = fit(DPOModule(source, SGD), pairs, token_budget=token_budget, layout=layout)
    assert watch.metrics[0]["loss"] == pytest.approx(log(2), abs=1e-6)


@layouts
@budgets
def test_what_is_logged_is_of_the_whole_step(layout: str, token_budget: int) -> None:
    losses = {"sigmoid": 0.8, "hinge": 0.2}
    (whole,) = fit(policy(loss=losses)).metrics
    (cut,) = fit(policy(loss=losses), token_budget=token_budget, layout=layout).metrics
    assert cut == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert {"loss", "loss/sigmoid", "loss/hinge", "rewards/margins", "logps/chosen"} <= set(cut)


@budgets
def test_the_optimizer_steps_once_a_batch(token_budget: int) -> None:
    watch = fit(policy(), token_budget=token_budget, batch_size=2)
    assert watch.counts == [1, 2, 3]
    assert len(watch.gradients) == 3


def test_no_gradient_of_a_step_is_left_for_the_next() -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    first, second = fit(policy(still), [*PAIRS, *PAIRS], token_budget=SOME).gradients
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", [policy, partial(RewardModule, REWARD, SGD)])
def test_weights_of_bfloat16_train(make: Callable[[], LightningModule]) -> None:
    whole, cut = (fit(make(), token_budget=b, precision="bf16-true") for b in (WHOLE, SOME))
    assert whole.metrics[0]["loss"] == pytest.approx(cut.metrics[0]["loss"], rel=0.02)


class Seen(Callback):
    """Keeps the reference that a step gets."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.references = [float(v) for micro in batch for v in micro.reference.chosen]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_log_probabilities_that_come_with_pairs_are_never_rounded(precision: str) -> None:
    seen = Seen()
    fit(policy(), others=[seen], precision=precision)
    expected = [pair.ref_chosen_logps for pair in PAIRS]
    assert sorted(seen.references) == sorted(torch.tensor(expected).tolist())


class Probe(Callback):
    """Leaves a gradient behind, as a look at one does."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        sum(p.sum() for p in pl_module.parameters()).backward()  # type: ignore[union-attr]


def test_a_gradient_that_a_callback_leaves_is_not_of_the_step() -> None:
    (alone,) = fit(policy()).gradients
    (probed,) = fit(policy(), others=[Probe()]).gradients
    assert torch.equal(alone, probed)


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: PairScorer, batch: PairBatch) -> PairLogps:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PairScorer, "__call__", exhausted)
    longest = max(len(micro.tree.tokens) for micro in micro_batches(PAIRS, SOME))
    with pytest.raises(RunError, match=f"micro-batch of {longest} tokens; lower data.token_budget"):
        fit(policy(), token_budget=SOME)


class TestClipping:
    @budgets
    def test_the_gradient_of_the_whole_step_is_clipped(self, token_budget: int) -> None:
        expected, _ = plain_mean(PAIRS)
        norm = float(expected.norm())
        clipped = fit(policy(gradient_clip_val=norm / 4), token_budget=token_budget)
        assert_same(clipped.gradients[0], expected / 4, 2e-6)
        loose = fit(policy(gradient_clip_val=norm * 1.01), token_budget=token_budget)
        assert_same(loose.gradients[0], expected)

    def test_a_reward_models_too(self) -> None:
        (free,) = fit(RewardModule(REWARD, SGD), token_budget=SOME).gradients
        module = RewardModule(REWARD, SGD, gradient_clip_val=float(free.norm()) / 3)
        assert_same(fit(module, token_budget=SOME).gradients[0], free / 3, 2e-6)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_fused_optimizer_and_bfloat16_go_with_it(self, fused: bool) -> None:
        module = policy(partial(ADAMW, fused=fused), gradient_clip_val=0.01)
        watch = fit(module, token_budget=SOME, precision="bf16-mixed")
        assert float(watch.gradients[0].norm()) == pytest.approx(0.01, rel=1e-4)

    @pytest.mark.parametrize("fused", [False, True])
    def test_of_scaled_gradients_the_norm_before_scaling_is_meant(self, fused: bool) -> None:
        module, scale = policy(partial(ADAMW, fused=fused), gradient_clip_val=0.01), 2.0**12
        scaler = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
        watch = fit(module, token_budget=SOME, plugins=[scaler])
        # a fused optimizer takes the scale out within its step
        norm = float(watch.gradients[0].norm()) / (scale if fused else 1)
        assert norm == pytest.approx(0.01, rel=1e-3)


@layouts
@budgets
def test_a_reward_models_gradient_is_that_of_the_mean_too(layout: str, token_budget: int) -> None:
    settings: dict[str, Any] = {"label_smoothing": 0.1, "centring": 0.05}
    watch = fit(RewardModule(REWARD, SGD, **settings), token_budget=token_budget, layout=layout)
    model, batch = REWARD.load_model(), collate(PAIRS)
    # the model's own forward on one row
    rows = [p.prompt_ids + p.chosen_ids for p in PAIRS]
    rows += [p.prompt_ids + p.rejected_ids for p in PAIRS]
    scores = [model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows]
    rewards = Rewards(*torch.stack(scores).chunk(2))
    losses = bradley_terry_loss(*rewards, margin=batch.margin, **settings)
    loss = (losses * batch.weight).mean()
    loss.backward()
    assert_same(watch.gradients[0], gradient_of(model))
    expected = {
        "loss": loss,
        "margin": (rewards.chosen - rewards.rejected).mean(),
        "min_reward": torch.cat(rewards).min(),
    }
    logged = {name: watch.metrics[0][name] for name in expected}
    assert logged == pytest.approx({n: float(v.detach()) for n, v in expected.items()}, rel=1e-5)


def with_experts() -> PreTrainedModel:
    model = tiny_reward_model()
    settings = MoESettings(experts=4, active=3, noise=False)
    upcycle(model, settings, generator=torch.Generator().manual_seed(0))
    return model


EXPERTS = LargeStart(with_experts)


def routed(batch: PairBatch) -> tuple[float, dict[str, Routing]]:
    """Ranking loss and routings of pairs in one forward of the model's own, padded."""
    model, (ids, mask) = EXPERTS.load_model(), pad_tree(batch.tree)
    with torch.no_grad(), recorded_routing(model, mask) as routings:
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    losses = bradley_terry_loss(*scores.chunk(2), margin=batch.margin)
    return float((losses * batch.weight).mean()), routings


@layouts
def test_the_balance_of_one_micro_batch_is_the_formula(layout: str) -> None:
    (logged,) = fit(RewardModule(EXPERTS, SGD, balance=0.5), layout=layout).metrics
    ranking, routings = routed(collate(PAIRS))
    balance = sum(
        float(amounts.var(correction=0) / amounts.mean() ** 2)
        for routing in routings.values()
        for amounts in (routing.importance, routing.load)
    )
    assert balance > 0.01
    assert logged["balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert logged["loss"] == pytest.approx(ranking + 0.5 * balance, rel=1e-5)


@layouts
def test_of_several_micro_batches_the_routings_of_the_step_are_logged(layout: str) -> None:
    module = RewardModule(EXPERTS, SGD, balance=0.5)
    (logged,) = fit(module, token_budget=SOME, layout=layout).metrics
    _, step = routed(collate(PAIRS))
    assert list(module.routings) == list(step)
    for name, routing in module.routings.items():
        torch.testing.assert_close(routing._asdict(), step[name]._asdict(), rtol=1e-5, atol=1e-6)
    balance = float(total_balance_loss(step))
    assert logged["balance_loss"] == pytest.approx(balance, rel=1e-5)
    # minimised is the balance within each micro-batch, by its share of the pairs
    minimised = 0.0
    for micro in micro_batches(PAIRS, SOME):
        ranking, routings = routed(micro)
        loss = ranking + 0.5 * float(total_balance_loss(routings))
        minimised += loss * len(micro.weight) / len(PAIRS)
    assert logged["loss"] == pytest.approx(minimised, rel=1e-5)
