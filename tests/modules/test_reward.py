from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from tests.models.tiny import tiny_reward_model, tiny_tokenizer
from tpmm_pl.data.batching import PairLoader, collate
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.data.rewards import evaluation_loaders
from tpmm_pl.losses import bradley_terry_loss
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.reward import PretrainedReward, RewardScorer
from tpmm_pl.modules.pair_validation import (
    pair_metrics,
    refuse_not_finite,
    update_pair_metrics,
)
from tpmm_pl.modules.reward import (
    RewardModule,
    generator_of,
    reward_metrics,
)
from tpmm_pl.moe.routing import MoESettings, balance_loss
from tpmm_pl.types import InputError, Pair, Rewards, RunError

SGD = partial(torch.optim.SGD, lr=0.5)
MOE = MoESettings(experts=4, active=3)


def pair(*words: int, **columns: float) -> Pair:
    first, *rest = words
    chosen, rejected = tuple(rest[::2]), tuple(rest[1::2])
    return Pair("p", "", "", "", (first, 6), (*chosen, 1), (*rejected, 1), **columns)  # type: ignore[arg-type]


PAIRS = [
    pair(7, 8, 9, margin=0.5),
    pair(10, 11, 12, 13),
    pair(14, 15, 16, 17, 18, margin=-0.25),
    pair(19, 20, 21),
]


class Steps(Callback):
    """Keeps losses, metrics and learning rates of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})


class Stop(Callback):
    """Saves a checkpoint after the first batch and ends the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def fit(
    module: RewardModule,
    *,
    pairs: list[Pair] = PAIRS,
    batch_size: int = 2,
    epochs: int = 1,
    **settings: Any,
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=settings.pop("callbacks", []),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = PairLoader(pairs, batch_size=batch_size, seed=0, epoch=0, shuffle=False)
    trainer.fit(module, loader, **settings)
    return trainer


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = tiny_reward_model()
    for parameter in model.parameters():
        parameter.data *= 3
    export_model(model, tiny_tokenizer(), None, tmp_path / "rm")
    return str(tmp_path / "rm")


def test_the_first_loss_of_a_head_of_zeros_is_log_2(tmp_path: Path) -> None:
    model, steps = tiny_reward_model(), Steps()
    model.score.weight.data.zero_()
    export_model(model, tiny_tokenizer(), None, tmp_path / "rm")
    pairs = [replace(p, margin=0.0) for p in PAIRS]
    module = RewardModule(PretrainedReward(str(tmp_path / "rm")), SGD, label_smoothing=0.1)
    fit(module, pairs=pairs, callbacks=[steps])
    assert steps.losses[0] == pytest.approx(log(2), abs=1e-6)
    assert steps.losses[1] != pytest.approx(log(2), abs=1e-6)


def test_the_loss_is_that_of_the_scores_with_every_setting(folder: str) -> None:
    steps, pairs = Steps(), [replace(p, weight=k + 0.5) for k, p in enumerate(PAIRS)]
    batch = collate(pairs)
    with torch.no_grad():
        rewards = RewardScorer(PretrainedReward(folder).load_model())(batch)
    losses = bradley_terry_loss(*rewards, margin=batch.margin, label_smoothing=0.2, centring=0.3)
    module = RewardModule(PretrainedReward(folder), SGD, label_smoothing=0.2, centring=0.3)
    fit(module, pairs=pairs, batch_size=4, callbacks=[steps])
    assert steps.losses == [pytest.approx(float((losses * batch.weight).mean()), abs=1e-6)]
    expected = {name: float(value) for name, value in reward_metrics(rewards).items()}
    assert steps.metrics[0] == pytest.approx({"loss": steps.losses[0], **expected}, abs=1e-6)


def test_the_metrics_of_a_batch_by_hand() -> None:
    rewards = Rewards(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.5, 0.5]))
    found = {name: float(value) for name, value in reward_metrics(rewards).items()}
    assert found == pytest.approx(
        {
            # a tie is not right
            "accuracy": 1 / 3,
            "margin": -0.5,
            "min_reward": -1.0,
            "mean_reward": 0.75,
            "max_reward": 2.0,
        }
    )


def test_the_learning_rate_falls_over_the_whole_fit(folder: str) -> None:
    steps = Steps()
    fit(RewardModule(PretrainedReward(folder), SGD, schedule="linear"), epochs=2, callbacks=[steps])
    assert steps.rates == [0.5, 0.375, 0.25, 0.125]


def test_experts_add_their_balance_to_what_is_minimised(folder: str) -> None:
    source, without, within = PretrainedReward(folder, moe=MOE), Steps(), Steps()
    fit(RewardModule(source, SGD, balance=0.0), batch_size=4, callbacks=[without])
    module = RewardModule(source, SGD, balance=0.5)
    fit(module, batch_size=4, callbacks=[within])
    balance = within.metrics[0]["balance_loss"]
    assert balance > 0
    assert without.metrics[0]["balance_loss"] == pytest.approx(balance, abs=1e-6)
    assert within.losses[0] == pytest.approx(without.losses[0] + 0.5 * balance, abs=1e-6)
    # of all layers together
    layers = [float(balance_loss(routing)) for routing in module.routings.values()]
    assert len(layers) == 2
    assert sum(layers) == pytest.approx(within.metrics[-1]["balance_loss"], abs=1e-6)
    assert within.metrics[0]["loss"] == pytest.approx(within.losses[0], abs=1e-6)


def test_the_last_routings_are_there_to_look_at(folder: str) -> None:
    module = RewardModule(PretrainedReward(folder, moe=MOE), SGD)
    fit(module)
    assert len(module.routings) == 2
    tokens = int(pad_tree(collate(PAIRS[2:]).tree)[1].sum())
    for routing in module.routings.values():
        # two routed experts a token that is no padding
        assert int(routing.counts.sum()) == 2 * tokens
        assert not any(value.requires_grad for value in routing)


def test_a_model_whose_rewards_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_reward_model()
    model.score.weight.data.fill_(float("nan"))
    export_model(model, tiny_tokenizer(), None, tmp_path / "rm")
    with pytest.raises(InputError, match="rewards of the untrained model are not finite"):
        fit(RewardModule(PretrainedReward(str(tmp_path / "rm")), SGD))


class TestHeldOutPairs:
    def counted(self, margins: list[float]) -> dict[str, float]:
        metrics = pair_metrics(torch.device("cpu"))
        for margin in margins:
            rewards = Rewards(torch.tensor([1.0 + margin]), torch.ones(1))
            update_pair_metrics(metrics, rewards)
        return {name: float(metric.compute()) for name, metric in metrics.items()}

    def test_probabilities_that_are_right_as_often_as_they_say_have_no_calibration_error(
        self,
    ) -> None:
        # sigmoid(log 3) = 3/4, right three times in four
        found = self.counted([log(3), log(3), log(3), -log(3)])
        expected = {"accuracy": 0.75, "margin": log(3) / 2, "calibration_error": 0.0}
        assert found == pytest.approx(expected, abs=1e-6)

    def test_probabilities_of_three_quarters_that_are_always_right_err_by_a_quarter(self) -> None:
        found = self.counted([log(3)] * 4)
        expected = {"accuracy": 1.0, "margin": log(3), "calibration_error": 0.25}
        assert found == pytest.approx(expected, abs=1e-6)

    def test_timid_probabilities_that_are_always_right_err_too(self) -> None:
        # sigmoid(0.05) = 0.5125, right every time
        assert self.counted([0.05] * 4)["calibration_error"] == pytest.approx(0.4875, abs=1e-4)

    def test_every_domain_is_logged_by_its_name(self, folder: str) -> None:
        module = RewardModule(PretrainedReward(folder), partial(torch.optim.SGD, lr=0.0))
        domains = {"in_domain": PAIRS[:3], "out_of_domain": PAIRS[3:]}
        loaders = evaluation_loaders(domains, batch_size=2)
        metrics = fit(module, val_dataloaders=loaders).callback_metrics
        for domain, pairs in domains.items():
            with torch.no_grad():
                rewards = RewardScorer(module.reward)(collate(pairs))
            expected = {name: float(value) for name, value in reward_metrics(rewards).items()}
            for name in ("accuracy", "margin"):
                found = float(metrics[f"eval/{name}/{domain}"])
                assert found == pytest.approx(expected[name], abs=1e-5)
            assert f"eval/calibration_error/{domain}" in metrics
        assert sum(name.startswith("eval/") for name in metrics) == 6


@pytest.mark.parametrize("kind", [{"lora": LoraSettings(r=2, alpha=4)}, {"moe": MOE}])
def test_a_stopped_fit_resumes_to_the_same_weights(
    kind: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    def module(seed: int = 0) -> RewardModule:
        source = PretrainedReward(folder, seed=seed, **kind)
        return RewardModule(source, partial(torch.optim.AdamW, lr=1e-2), schedule="cosine")

    seed_everything(0, verbose=False)
    unbroken, broken, resumed, path = module(), module(), module(), tmp_path / "last.ckpt"
    fit(unbroken, epochs=2)
    fit(broken, epochs=2, callbacks=[Stop(path)])
    # the router's noise is not the global generator's
    torch.manual_seed(99)
    fit(resumed, epochs=2, ckpt_path=path, weights_only=True)
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    names = {name for name, _ in unbroken.named_parameters()}
    moved = {n for n in names if not torch.equal(broken.get_parameter(n), resumed.get_parameter(n))}
    assert any("score" in name for name in moved), "the resumed fit went on"


def test_the_noise_of_the_router_differs_by_step(folder: str) -> None:
    # a learning rate of 0: only the noise can change what is routed where
    source, still = PretrainedReward(folder, moe=MOE), partial(torch.optim.SGD, lr=0.0)
    steps, module = Steps(), RewardModule(source, still)
    fit(module, pairs=[PAIRS[2]] * 2, batch_size=1, callbacks=[steps])
    first, second = (step["balance_loss"] for step in steps.metrics)
    assert first != second
    drawn = [torch.rand(1, generator=generator_of(*key)) for key in [(1, 2), (2, 1), (1, 2)]]
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_checkpoint_of_an_adapter_holds_the_adapter_and_the_head_only(
    folder: str, tmp_path: Path
) -> None:
    source, path = PretrainedReward(folder, lora=LoraSettings(r=2, alpha=4)), tmp_path / "a.ckpt"
    fit(RewardModule(source, SGD), callbacks=[Stop(path)])
    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert len([name for name in names if "score.modules_to_save" in name]) == 1
    assert all("lora_" in name or "score.modules_to_save" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must be in \[0, 0.5\)"),
        ({"centring": -1.0}, "centring -1.0 and balance 0.01 must not be negative"),
        ({"balance": -0.1}, "centring 0.0 and balance -0.1 must not be negative"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean cosine"),
        ({"warmup": 1.5}, r"warmup is 1.5; it is a share of the fit's steps, in \[0, 1\]"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_at_once(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        RewardModule(PretrainedReward("owner/name"), SGD, **settings)


def test_rewards_that_stop_being_numbers_end_the_run_at_their_step() -> None:
    bad = Rewards(torch.tensor([1.0, torch.nan]), torch.zeros(2))
    with pytest.raises(RunError, match="rewards at step 7 are not finite; lower the learning rate"):
        refuse_not_finite(bad, 7)
