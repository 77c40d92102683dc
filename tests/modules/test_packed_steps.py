"""One optimizer step of several micro-batches against the plain mean over its pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.models.tiny import EOS, tiny_gpt2, tiny_llama, tiny_reward_model
from tests.modules.twenty_steps import LargeStart
from tpmm_pl.data.batching import PairLoader, collate, micro_batches
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.models.tree_attention import TreeMask
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.reward import RewardModule
from tpmm_pl.moe.convert import upcycle
from tpmm_pl.moe.routing import MoESettings, Routing, joined, recorded_routing
from tpmm_pl.types import InputError, Pair, PairBatch, PairLogps, RunError

SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
WHOLE, ONE_BY_ONE = 4096, 1
"""Token budgets: all pairs at once, every pair a micro-batch."""
MOE = MoESettings(experts=4, active=3, noise=False)


POLICY, REWARD = LargeStart(tiny_llama), LargeStart(tiny_reward_model)


def with_experts() -> PreTrainedModel:
    model = tiny_reward_model()
    upcycle(model, MOE, generator=torch.Generator().manual_seed(0))
    return model


def make_pairs(count: int = 6) -> list[Pair]:
    """Pairs of unequal lengths and weights, two of one prompt, not scored."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 32, (length,), generator=generator).tolist())

    prompts = [tokens(2 + 3 * (k % 3)) for k in range(count)]
    prompts[1] = prompts[0]
    return [
        Pair(
            *(f"p{k}", "", "", "", prompt, (*tokens(1 + k), EOS), (*tokens(7 - k), EOS)),
            weight=0.5 + k / 4,
            margin=k / 8,
        )
        for k, prompt in enumerate(prompts)
    ]


def scored(model: PreTrainedModel, pairs: list[Pair]) -> list[Pair]:
    logps = score_pairs(model, pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    return [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]


# a reference that is not the start: the losses of the pairs differ
PAIRS = scored(LargeStart(partial(tiny_llama, seed=1)).load_model(), make_pairs())


class Watch(Callback):
    """Keeps the gradient that every optimizer step takes, and what was logged."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.metrics: list[dict[str, float]] = []
        self.counts: list[int] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.gradients.append(flat(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})
        assert float(outputs["loss"]) == self.metrics[-1]["loss"]
        self.counts.append(trainer.global_step)


class Padded(Callback):
    """Takes the way of models that cannot be packed."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module._scorer._pass.packs = False  # type: ignore[union-attr]


def flat(module: nn.Module) -> Tensor:
    """All gradients in one row, in float64."""
    found = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(found)


def fit(
    module: LightningModule,
    pairs: list[Pair],
    *,
    token_budget: int = WHOLE,
    batch_size: int = 6,
    layout: str = "packed",
    **settings: Any,
) -> Watch:
    watch = Watch()
    order: dict[str, Any] = {"seed": 0, "epoch": 0, "shuffle": False}
    loader = PairLoader(pairs, batch_size=batch_size, token_budget=token_budget, **order)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[watch] if layout == "packed" else [Padded(), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, loader)
    return watch


def policy(optimizer: Any = SGD, **settings: Any) -> DPOModule:
    return DPOModule(POLICY, optimizer, beta=0.5, **settings)


def row_logps(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """The model's own forward on one row, nothing shared and nothing padded."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, torch.tensor(completion)[:, None]).sum()


def plain_gradient(pairs: list[Pair]) -> tuple[Tensor, float]:
    """Gradient and value of the mean of w * -log sigmoid(beta * margin), row by row."""
    model, losses = POLICY.load_model(), []
    for p in pairs:
        margin = row_logps(model, p.prompt_ids, p.chosen_ids) - p.ref_chosen_logps
        margin = margin - row_logps(model, p.prompt_ids, p.rejected_ids) + p.ref_rejected_logps
        losses.append(-p.weight * F.logsigmoid(0.5 * margin))
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return flat(model), float(loss.detach())


def assert_same(gradient: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert gradient.shape == expected.shape
    assert float((gradient - expected).norm()) <= tolerance * float(expected.norm())


layouts = pytest.mark.parametrize("layout", ["packed", "padded"])
budgets = pytest.mark.parametrize("token_budget", [ONE_BY_ONE, 30, WHOLE])


def test_the_budgets_of_these_tests_cut_a_step_differently() -> None:
    assert [len(micro_batches(PAIRS, budget)) for budget in (ONE_BY_ONE, 30, WHOLE)] == [6, 4, 1]


@layouts
@budgets
def test_the_gradient_of_a_step_is_that_of_the_mean_however_it_is_cut(
    layout: str, token_budget: int
) -> None:
    watch = fit(policy(), PAIRS, token_budget=token_budget, layout=layout)
    expected, loss = plain_gradient(PAIRS)
    assert_same(watch.gradients[0], expected)
    assert watch.metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_weight_of_a_pair_counts_in_whatever_micro_batch_it_is() -> None:
    alone = [replace(p, weight=6.0 * (k == 3)) for k, p in enumerate(PAIRS)]
    watch = fit(policy(), alone, token_budget=ONE_BY_ONE)
    expected, loss = plain_gradient([replace(PAIRS[3], weight=1.0)])
    assert_same(watch.gradients[0], expected)
    assert watch.metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)


@layouts
@budgets
@pytest.mark.parametrize("make", [tiny_llama, partial(tiny_gpt2, dropout=0.0)], ids=["llama", "gpt2"])
def test_the_first_loss_is_log_2_in_every_layout(
    make: Callable[[], PreTrainedModel], layout: str, token_budget: int
) -> None:
    source = LargeStart(make)
    pairs = [replace(p, weight=1.0) for p in scored(source.load_model(), PAIRS)]
    watch = fit(DPOModule(source, SGD), pairs, token_budget=token_budget, layout=layout)
    assert watch.metrics[0]["loss"] == pytest.approx(log(2), abs=1e-6)
    assert watch.metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@layouts
@budgets
def test_what_is_logged_is_of_the_whole_step(layout: str, token_budget: int) -> None:
    losses = {"sigmoid": 0.8, "hinge": 0.2}
    whole = fit(policy(loss=losses), PAIRS).metrics[0]
    cut = fit(policy(loss=losses), PAIRS, token_budget=token_budget, layout=layout).metrics[0]
    assert cut == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert {"loss", "loss/sigmoid", "loss/hinge", "rewards/margins", "logps/chosen"} <= set(cut)


@budgets
def test_the_optimizer_steps_once_a_batch(token_budget: int) -> None:
    watch = fit(policy(), PAIRS, token_budget=token_budget, batch_size=2)
    assert watch.counts == [1, 2, 3]
    assert len(watch.gradients) == 3


def test_no_gradient_of_a_step_is_left_for_the_next() -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    twice = fit(policy(still), [*PAIRS, *PAIRS], token_budget=ONE_BY_ONE)
    assert torch.equal(*twice.gradients)


class TestClipping:
    @budgets
    def test_the_gradient_of_the_whole_step_is_clipped(self, token_budget: int) -> None:
        expected, _ = plain_gradient(PAIRS)
        norm = float(expected.norm())
        clipped = fit(policy(gradient_clip_val=norm / 4), PAIRS, token_budget=token_budget)
        assert_same(clipped.gradients[0], expected / 4, 2e-6)
        loose = fit(policy(gradient_clip_val=norm * 1.01), PAIRS, token_budget=token_budget)
        assert_same(loose.gradients[0], expected)

    @pytest.mark.parametrize("fused", [False, True])
    def test_under_bf16_mixed_too_with_a_fused_optimizer_or_not(self, fused: bool) -> None:
        module = policy(partial(ADAMW, fused=fused), gradient_clip_val=0.01)
        watch = fit(module, PAIRS, token_budget=30, precision="bf16-mixed")
        assert float(watch.gradients[0].norm()) == pytest.approx(0.01, rel=1e-4)

    @pytest.mark.parametrize("fused", [False, True])
    def test_what_a_scaler_has_scaled_is_clipped_to_the_norm_before(self, fused: bool) -> None:
        module = policy(partial(ADAMW, fused=fused), gradient_clip_val=0.01)
        scale = 2.0**12
        scaler = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
        watch = fit(module, PAIRS, token_budget=30, plugins=[scaler])
        # a fused optimizer takes the scale out within its step
        scaled = scale if fused else 1.0
        assert float(watch.gradients[0].norm()) == pytest.approx(0.01 * scaled, rel=1e-3)

    def test_a_reward_models_step_too(self) -> None:
        free = fit(RewardModule(REWARD, SGD), PAIRS, token_budget=30).gradients[0]
        norm = float(free.norm())
        module = RewardModule(REWARD, SGD, gradient_clip_val=norm / 3)
        assert_same(fit(module, PAIRS, token_budget=30).gradients[0], free / 3, 2e-6)


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: PairScorer, batch: PairBatch) -> PairLogps:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PairScorer, "__call__", exhausted)
    longest = max(len(micro.tree.tokens) for micro in micro_batches(PAIRS, 30))
    with pytest.raises(RunError, match=f"out of memory at a micro-batch of {longest} tokens; lower"):
        fit(policy(), PAIRS, token_budget=30)


class TestRewardModels:
    @layouts
    @budgets
    def test_the_gradient_of_a_step_is_that_of_the_mean(
        self, layout: str, token_budget: int
    ) -> None:
        settings = {"label_smoothing": 0.1, "centring": 0.05}
        module = RewardModule(REWARD, SGD, **settings)
        watch = fit(module, PAIRS, token_budget=token_budget, layout=layout)
        model = REWARD.load_model()
        chosen, rejected = (
            torch.stack([own_score(model, p.prompt_ids + getattr(p, side)) for p in PAIRS])
            for side in ("chosen_ids", "rejected_ids")
        )
        margin, weight = (torch.tensor([getattr(p, n) for p in PAIRS]) for n in ("margin", "weight"))
        loss = (bradley_terry_loss(chosen, rejected, margin=margin, **settings) * weight).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert_same(watch.gradients[0], flat(model))
        logged = watch.metrics[0]
        assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert logged["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-5)
        lowest = float(torch.cat([chosen, rejected]).min())
        assert logged["min_reward"] == pytest.approx(lowest, rel=1e-5)

    @layouts
    def test_the_balance_of_one_micro_batch_is_the_formula(self, layout: str) -> None:
        module = RewardModule(LargeStart(with_experts), SGD, balance=0.5)
        watch = fit(module, PAIRS, layout=layout)
        rewards, routings = routed(PAIRS)
        balance = sum(
            float(amounts.var(correction=0) / amounts.mean() ** 2)
            for routing in routings.values()
            for amounts in (routing.importance, routing.load)
        )
        losses = bradley_terry_loss(*rewards, margin=torch.tensor([p.margin for p in PAIRS]))
        ranking = float((losses * torch.tensor([p.weight for p in PAIRS])).mean())
        assert watch.metrics[0]["balance_loss"] == pytest.approx(balance, rel=1e-5)
        assert watch.metrics[0]["loss"] == pytest.approx(ranking + 0.5 * balance, rel=1e-5)
        assert balance > 0.01

    @layouts
    def test_of_several_micro_batches_the_routings_are_joined(self, layout: str) -> None:
        module = RewardModule(LargeStart(with_experts), SGD, balance=0.5)
        watch = fit(module, PAIRS, token_budget=30, layout=layout)
        _, whole = routed(PAIRS)
        for name, routing in module.routings.items():
            torch.testing.assert_close(routing._asdict(), whole[name]._asdict())
        assert list(module.routings) == list(whole)
        # what is minimised is the balance within every micro-batch; what is logged is the step's
        balance = float(total_balance_loss(whole))
        assert watch.metrics[0]["balance_loss"] == pytest.approx(balance, rel=1e-5)
        parts = [routed(cut) for cut in cuts(PAIRS, 30)]
        minimised = sum(
            len(rewards.chosen) / len(PAIRS) * float(total_balance_loss(routings))
            for rewards, routings in parts
        )
        losses = bradley_terry_loss(
            *routed(PAIRS)[0], margin=torch.tensor([p.margin for p in PAIRS])
        )
        ranking = float((losses * torch.tensor([p.weight for p in PAIRS])).mean())
        assert watch.metrics[0]["loss"] == pytest.approx(ranking + 0.5 * minimised, rel=1e-5)
        assert minimised > balance


def own_score(model: nn.Module, row: tuple[int, ...]) -> Tensor:
    """The model's own forward on one row; its padding token is none of them."""
    return model(input_ids=torch.tensor([row])).logits[0, 0]


def routed(pairs: list[Pair]) -> tuple[Rewards, dict[str, Routing]]:
    """Rewards and routings of all rows of pairs in one forward of the model, padded."""
    model, (ids, mask) = LargeStart(with_experts).load_model(), pad_tree(collate(pairs).tree)
    with torch.no_grad(), recorded_routing(model, mask) as routings:
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return Rewards(*scores.chunk(2)), routings
