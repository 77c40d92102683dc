from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from math import cos, exp, isnan, log, pi
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from tests.callbacks.recorder import Recorder
from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.cli import main
from tpmm_pl.data.batching import PairLoader
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.modules.dpo import DPOModule, learning_rate_factor
from tpmm_pl.types import InputError, Pair

SGD = partial(torch.optim.SGD, lr=0.5)


def pair(*words: int, **columns: float) -> Pair:
    first, *rest = words
    chosen, rejected = tuple(rest[::2]), tuple(rest[1::2])
    return Pair("p", "", "", "", (first, 6), (*chosen, 1), (*rejected, 1), **columns)  # type: ignore[arg-type]


PAIRS = [pair(7, 8, 9), pair(10, 11, 12, 13), pair(14, 15, 16, 17, 18), pair(19, 20, 21)]


def scored(source: PretrainedPolicy, pairs: list[Pair]) -> list[Pair]:
    logps = score_pairs(source.load_model(), pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    return [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]


def fit(
    module: DPOModule, pairs: list[Pair], *, batch_size: int = 2, epochs: int = 1, **settings: Any
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
def llama(tmp_path: Path) -> PretrainedPolicy:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "llama")
    return PretrainedPolicy(str(tmp_path / "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=4)])
def test_the_first_loss_is_log_2(name: str, lora: LoraSettings | None, tmp_path: Path) -> None:
    # of GPT-2 with dropout in its configuration
    model = tiny_llama() if name == "llama" else tiny_gpt2(dropout=0.3)
    export_model(model, tiny_tokenizer(), None, tmp_path / "model")
    source, recorder = PretrainedPolicy(str(tmp_path / "model"), lora=lora), Recorder()
    trainer = fit(DPOModule(source, SGD), scored(source, PAIRS), callbacks=[recorder])
    assert recorder.losses[0][0] == pytest.approx(log(2), abs=1e-6)
    assert recorder.losses[0][1] != pytest.approx(log(2), abs=1e-6)
    assert trainer.lightning_module.training


def test_the_loss_is_against_the_reference_columns_of_the_pairs(llama: PretrainedPolicy) -> None:
    # a reference that prefers the rejected completion by 3 nats more than the policy does
    pairs = [replace(p, ref_rejected_logps=p.ref_rejected_logps + 3) for p in scored(llama, PAIRS)]
    recorder = Recorder()
    trainer = fit(DPOModule(llama, SGD, beta=0.5), pairs, batch_size=4, callbacks=[recorder])
    assert recorder.losses[0] == [pytest.approx(log(1 + exp(-0.5 * 3)), abs=1e-5)]
    metrics = trainer.callback_metrics
    expected = {
        "rewards/chosen": 0.0,
        "rewards/rejected": -1.5,
        "rewards/margins": 1.5,
        "rewards/accuracies": 1.0,
        "loss": recorder.losses[0][0],
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, abs=1e-5)
    mean = sum(p.ref_chosen_logps for p in pairs) / len(pairs)
    assert float(metrics["logps/chosen"]) == pytest.approx(mean, abs=1e-5)


def test_a_pair_counts_by_its_weight(llama: PretrainedPolicy) -> None:
    whole, halved, alone = Recorder(), Recorder(), Recorder()
    pairs = [replace(p, ref_rejected_logps=p.ref_rejected_logps + 3) for p in scored(llama, PAIRS)]
    fit(DPOModule(llama, SGD), pairs, batch_size=4, callbacks=[whole])
    light = [replace(p, weight=0.5) for p in pairs]
    fit(DPOModule(llama, SGD), light, batch_size=4, callbacks=[halved])
    assert halved.losses[0][0] == pytest.approx(whole.losses[0][0] / 2, abs=1e-6)
    blank = [replace(p, weight=float(k == 0) * 4) for k, p in enumerate(pairs)]
    module, other = DPOModule(llama, SGD), DPOModule(llama, SGD)
    fit(module, blank, batch_size=4)
    fit(other, pairs[:1], batch_size=4, callbacks=[alone])
    for name, parameter in module.policy.named_parameters():
        assert torch.allclose(parameter, other.policy.get_parameter(name), atol=1e-6), name


def test_the_parts_of_a_weighted_sum_are_logged(llama: PretrainedPolicy) -> None:
    recorder, alone = Recorder(), Recorder()
    pairs = [replace(p, weight=0.5) for p in scored(llama, PAIRS)]
    module = DPOModule(llama, SGD, loss={"sigmoid": 0.8, "sft": 0.25})
    metrics = fit(module, pairs, batch_size=4, callbacks=[recorder]).callback_metrics
    tokens = sum(len(p.chosen_ids) for p in pairs)
    expected = {
        "loss/sigmoid": log(2) / 2,
        "loss/sft": -sum(p.ref_chosen_logps for p in pairs) / tokens / 2,
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, abs=1e-5)
    total = 0.8 * expected["loss/sigmoid"] + 0.25 * expected["loss/sft"]
    assert recorder.losses[0] == [pytest.approx(total, abs=1e-5)]
    lone = fit(DPOModule(llama, SGD), pairs, batch_size=4, callbacks=[alone]).callback_metrics
    assert alone.losses[0] == [pytest.approx(expected["loss/sigmoid"], abs=1e-6)]
    assert not any(name.startswith("loss/") for name in lone)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sft", {"simpo": 1.0, "sft": 0.1}])
def test_a_reference_free_loss_says_so_and_reads_no_reference(
    loss: str | dict[str, float], llama: PretrainedPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    under_start = scored(llama, PAIRS)
    with_reference, without = Recorder(), Recorder()
    fit(DPOModule(llama, SGD, loss=loss), under_start, callbacks=[with_reference])
    capsys.readouterr()
    module = DPOModule(llama, SGD, loss=loss, beta=0.5)
    fit(module, PAIRS, callbacks=[Recorder()])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "reference" in line]
    assert line == f"loss {module.loss}: no reference, the rounds' pairs are not scored under one"
    assert not module.needs_reference

    fit(DPOModule(llama, SGD, loss=loss), PAIRS, callbacks=[without])
    assert without.losses == with_reference.losses
    assert not any(isnan(value) for value in without.losses[0])

    module = DPOModule(llama, SGD, loss=loss, beta=0.5)
    metrics = fit(module, PAIRS, batch_size=4).callback_metrics
    assert not any(isnan(float(value)) for value in metrics.values())
    # the implicit reward is beta times the log-probability a token
    by_token = [p.ref_chosen_logps / len(p.chosen_ids) for p in under_start]
    expected = 0.5 * sum(by_token) / len(by_token)
    assert float(metrics["rewards/chosen"]) == pytest.approx(expected, abs=1e-5)
    whole = sum(p.ref_rejected_logps for p in under_start) / len(under_start)
    assert float(metrics["logps/rejected"]) == pytest.approx(whole, abs=1e-5)


def test_a_loss_with_a_reference_says_nothing(
    llama: PretrainedPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    module = DPOModule(llama, SGD, loss=["simpo", "sigmoid"])
    fit(module, scored(llama, PAIRS))
    assert module.needs_reference
    assert "reference" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("apo_zero", "apo_zero"),
        ("[sigmoid, bco_pair, sft]", ["sigmoid", "bco_pair", "sft"]),
        ("{sigmoid: 0.8, sft: 1}", {"sigmoid": 0.8, "sft": 1.0}),
    ],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_a_loss_is_read_from_the_command_line_and_from_a_file(
    written: str,
    read: object,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overlay = tmp_path / "loss.yaml"
    overlay.write_text(f"model:\n  init_args:\n    loss: {written}\n")
    flags = ["--config", str(overlay)] if place == "file" else ["--model.loss", written]
    base = ["tpmm", "fit", "--config", "configs/preferences.yaml"]
    monkeypatch.setattr(sys, "argv", [*base, *flags, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["loss"] == read


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1.0, (1 + cos(pi / 4)) / 2, 0.5, (1 + cos(3 * pi / 4)) / 2]),
        ("constant", 0.5, [0.0, 0.5, 1.0, 1.0]),
        ("linear", 0.5, [0.0, 0.5, 1.0, 0.5]),
        ("cosine", 0.25, [0.0, 1.0, 0.75, 0.25]),
        ("linear", 1.0, [0.0, 0.25, 0.5, 0.75]),
    ],
)
def test_the_learning_rate_of_a_round_of_four_steps_by_hand(
    schedule: str, warmup: float, expected: list[float]
) -> None:
    found = [learning_rate_factor(step / 4, schedule, warmup) for step in range(4)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epochs_per_round", "expected"),
    [(1, [[0.5, 0.25], [0.5, 0.25]]), (2, [[0.5, 0.375], [0.25, 0.125]] * 2)],
)
def test_every_round_has_the_whole_schedule(
    epochs_per_round: int, expected: list[list[float]], llama: PretrainedPolicy
) -> None:
    recorder = Recorder()
    module = DPOModule(llama, SGD, schedule="linear", epochs_per_round=epochs_per_round)
    epochs = 2 * epochs_per_round
    fit(module, scored(llama, PAIRS), epochs=epochs, callbacks=[recorder])
    assert recorder.rates == expected


class Stop(Callback):
    """Saves a checkpoint after a batch and ends the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def test_the_checkpoint_of_an_adapter_holds_the_adapter_only_and_resumes(
    llama: PretrainedPolicy, tmp_path: Path
) -> None:
    source = PretrainedPolicy(llama.name_or_path, lora=LoraSettings(r=2, alpha=4))
    pairs = scored(llama, PAIRS)

    def module() -> DPOModule:
        return DPOModule(source, partial(torch.optim.AdamW, lr=1e-2), schedule="cosine")

    seed_everything(0, verbose=False)
    unbroken, broken, resumed = module(), module(), module()
    fit(unbroken, pairs)
    seed_everything(0, verbose=False)
    path = tmp_path / "last.ckpt"
    fit(broken, pairs, callbacks=[Stop(path)])
    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert names == {n for n, _ in broken.named_parameters() if "lora_" in n}
    # other factors at first: what comes is the checkpoint's
    seed_everything(1, verbose=False)
    fit(resumed, pairs, ckpt_path=path, weights_only=True)
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert any(
        not torch.equal(p, broken.get_parameter(n)) for n, p in resumed.named_parameters()
    ), "the resumed fit went on"


def test_only_what_trains_has_an_optimizer(llama: PretrainedPolicy) -> None:
    source = PretrainedPolicy(llama.name_or_path, lora=LoraSettings(r=2, alpha=4))
    module = DPOModule(source, SGD)
    module.configure_model()
    (group,) = module.configure_optimizers().param_groups
    trained = {n for n, p in module.named_parameters() if any(p is q for q in group["params"])}
    assert trained == {n for n, _ in module.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "sigmod"}, "unknown loss 'sigmod'; did you mean sigmoid"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean cosine"),
        ({"warmup": 1.5}, r"warmup is 1.5; it is a share of a round's steps, in \[0, 1\]"),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"label_smoothing": 0.1}, "'sigmoid' does not use label_smoothing 0.1"),
        ({"simpo_gamma": 0.5}, "'sigmoid' does not use simpo_gamma 0.5; choose simpo"),
        ({"loss": ["simpo"], "discopop_tau": 0.5}, "'simpo' does not use discopop_tau 0.5"),
        ({"loss": {"sigmoid": 1.0, "stf": 0.1}}, "unknown loss 'stf'; did you mean sft"),
        ({"rounds": 0}, "rounds 0 and epochs_per_round 1 must be at least 1"),
        ({"epochs_per_round": 0}, "rounds 8 and epochs_per_round 0 must be at least 1"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_at_once(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        DPOModule(PretrainedPolicy(str(tmp_path)), SGD, **settings)
