"""Every loss that TRL has, on the same log-probabilities, with TRL's code as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.losses.samples import logps
from tests.models.tiny import EOS, tiny_llama, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.losses import orpo_loss, preference_loss, simpo_loss
from tpmm_pl.models.scoring import PairScorer, pair_tokens
from tpmm_pl.types import Pair

pytest.importorskip("trl")

PAIRS = [
    Pair("a", "", "", "", (6, 7, 8), (9, 10, EOS), (11, EOS)),
    Pair("b", "", "", "", (12, 6), (13, 14, 15, 16, EOS), (17, 18, 19, EOS)),
    Pair("c", "", "", "", (20,), (21, EOS), (22, 23, 24, 25, 26, EOS)),
]
SMOOTHED = ["robust", "exo_pair", "aot", "aot_unpaired"]
UNSMOOTHED = [
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "robust"),
]
CASES = [(name, 0.0) for name in UNSMOOTHED] + [(name, 0.2) for name in SMOOTHED]

Oracle = Callable[..., float]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    # large weights: a policy far from its reference
    pair = tiny_llama(seed=0), tiny_llama(seed=1)
    for model in pair:
        for parameter in model.parameters():
            parameter.data *= 4
    return pair


@pytest.fixture(scope="module")
def trl(models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference = models
    out: Path = tmp_path_factory.mktemp("trl")
    arguments = DPOConfig(
        output_dir=str(out),
        beta=0.2,
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    row = {"prompt": "w0", "chosen": "w1", "rejected": "w2"}
    trainer: Any = DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list([row]),
    )
    rows = [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for pair in PAIRS
    ]
    batch = trainer.data_collator(rows)

    def loss(weights: dict[str, float], smoothing: float) -> float:
        trainer.loss_types, trainer.loss_weights = list(weights), list(weights.values())
        trainer.label_smoothing = smoothing
        return float(trainer.compute_loss(policy, batch).detach())

    return loss


def ours(models: tuple[Any, Any], loss: str | dict[str, float], smoothing: float) -> float:
    batch = collate(PAIRS)
    policy, reference = (PairScorer(model)(batch) for model in models)
    losses = preference_loss(loss, beta=0.2, label_smoothing=smoothing)
    return float(losses(policy, reference, pair_tokens(batch)).mean().detach())


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_a_loss_costs_what_trls_does(
    name: str, smoothing: float, models: tuple[Any, Any], trl: Oracle
) -> None:
    expected = trl({name: 1.0}, smoothing)
    assert ours(models, name, smoothing) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_oracle_tells_the_losses_apart(trl: Oracle) -> None:
    values = [trl({name: 1.0}, 0.0) for name in UNSMOOTHED if name != "robust"]
    assert len({round(value, 4) for value in values}) == len(values)


def test_a_weighted_sum_costs_what_trls_does(models: tuple[Any, Any], trl: Oracle) -> None:
    # the weights of mixed preference optimisation, TRL's example of several losses
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    expected = trl(weights, 0.0)
    assert ours(models, weights, 0.0) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_simpo_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    settings = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected: Any = CPOTrainer.cpo_loss(settings, *logps(0))[0]  # type: ignore[arg-type]
    torch.testing.assert_close(simpo_loss(logps(0), beta=2.0, gamma=0.7), expected)


def test_the_odds_ratio_of_orpo_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    settings = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    # TRL subtracts it from a likelihood loss of its own
    theirs: Any = ORPOTrainer.odds_ratio_loss(settings, *logps(0))[0]  # type: ignore[arg-type]
    torch.testing.assert_close(orpo_loss(logps(0), beta=0.3) + logps(0).chosen, -theirs)
