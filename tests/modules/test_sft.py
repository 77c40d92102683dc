from __future__ import annotations

from functools import partial
from math import log
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch.optim import SGD
from transformers import LlamaConfig, LlamaForCausalLM

from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.modules.sft import DemonstrationBatch, SFTModule, completion_nll
from tpmm_pl.types import IGNORE_INDEX

# a training step outside of a fit has nobody to log to
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def _batch() -> DemonstrationBatch:
    ids = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 1, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 1], [-100, -100, 11, 1, -100]])
    return DemonstrationBatch(ids, (ids != 0).long(), labels)


def test_constant_logits_cost_log_v_a_token() -> None:
    loss = completion_nll(torch.zeros(2, 5, 32), _batch().labels)
    assert loss.item() == pytest.approx(log(32))


def test_the_nll_is_the_mean_over_labelled_tokens_by_hand() -> None:
    # p(label) is 1/2 (logits 0, 0) and 3/4 (logits log 3, 0); the third row of logits is unused
    logits = torch.tensor([[[0.0, 0.0], [log(3), 0.0], [9.0, 9.0]]])
    labels = torch.tensor([[IGNORE_INDEX, 1, 0]])
    assert completion_nll(logits, labels).item() == pytest.approx((log(2) + log(4 / 3)) / 2)


def test_half_precision_logits_are_reduced_in_float32() -> None:
    loss = completion_nll(torch.zeros(2, 5, 32, dtype=torch.bfloat16), _batch().labels)
    assert loss.dtype == torch.float32


def test_the_loss_agrees_with_transformers() -> None:
    model, batch = _model(), _batch()
    module = SFTModule(model, optimizer=partial(SGD, lr=0.1))
    expected = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_padding_does_not_change_the_loss() -> None:
    module = SFTModule(_model(), optimizer=partial(SGD, lr=0.1))
    batch = _batch()
    wider = DemonstrationBatch(
        torch.nn.functional.pad(batch.input_ids, (0, 3)),
        torch.nn.functional.pad(batch.attention_mask, (0, 3)),
        torch.nn.functional.pad(batch.labels, (0, 3), value=IGNORE_INDEX),
    )
    torch.testing.assert_close(module.training_step(wider, 0), module.training_step(batch, 0))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    module = SFTModule(_model(), optimizer=partial(SGD, lr=1.0), total_steps=6, warmup_steps=2)
    configured: Any = module.configure_optimizers()
    schedule = configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        configured["optimizer"].step()
        schedule.step()
    # 1/2 (1 + cos(pi s / 4)) after the two steps of warm-up
    assert rates == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_without_total_steps_the_learning_rate_stays() -> None:
    module = SFTModule(_model(), optimizer=partial(SGD, lr=1.0))
    assert isinstance(module.configure_optimizers(), SGD)


def test_a_fit_learns_its_demonstrations() -> None:
    module = SFTModule(_model(), optimizer=partial(torch.optim.AdamW, lr=1e-2), total_steps=30)
    before = module.training_step(_batch(), 0).item()
    fit_with_fabric(
        Fabric(accelerator="cpu", devices=1), module, [_batch()] * 30, title="supervised"
    )
    assert module.training_step(_batch(), 0).item() < before / 4
