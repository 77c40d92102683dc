"""Fits of one or a few steps, watched: which gradient the optimizer got, what was logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.tiny import EOS, tiny_llama, tiny_reward_model
from tests.modules.twenty_steps import LargeStart
from tpmm_pl.data.batching import PairLoader
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.types import Pair

POLICY, REWARD = LargeStart(tiny_llama), LargeStart(tiny_reward_model)

ONE_BY_ONE, SOME, WHOLE = 1, 40, 4096
"""Token budgets: every pair a micro-batch, a few at a time, all pairs at once."""


class Watch(Callback):
    """Keeps of every step the gradient, the metrics and the count of steps."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.metrics: list[dict[str, float]] = []
        self.counts: list[int] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.gradients.append(gradient_of(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})
        assert float(outputs["loss"]) == pytest.approx(self.metrics[-1]["loss"], nan_ok=True)
        self.counts.append(trainer.global_step)


class Padded(Callback):
    """Takes the way of models that cannot be packed."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scorer: Any = pl_module._scorer
        scorer._pass.packs = False


def gradient_of(module: nn.Module) -> Tensor:
    """Return all gradients in one row, float64."""
    found = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(found)


def scored(model: PreTrainedModel, pairs: list[Pair]) -> list[Pair]:
    """Write a model's log-probabilities to the pairs as their reference."""
    logps = score_pairs(model, pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    return [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]


def _pairs(count: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 32, (length,), generator=generator).tolist())

    prompts = [tokens(2 + 3 * (k % 3)) for k in range(count)]
    prompts[1] = prompts[0]
    return [
        Pair(
            *(f"p{k}", "", "", "", prompt, (*tokens(1 + k), EOS), (*tokens(count - k), EOS)),
            weight=0.5 + k / 4,
            margin=k / 8,
        )
        for k, prompt in enumerate(prompts)
    ]


# the reference is another model than the start: the losses of the pairs differ
PAIRS = scored(LargeStart(partial(tiny_llama, seed=1)).load_model(), _pairs(6))
"""Of unequal lengths, weights and margins; two have one prompt."""


def fit(
    module: LightningModule,
    pairs: list[Pair] = PAIRS,
    *,
    token_budget: int = WHOLE,
    batch_size: int = len(PAIRS),
    layout: str = "packed",
    others: Sequence[Callback] = (),
    **settings: Any,
) -> Watch:
    """Train on the pairs in their order."""
    watch = Watch()
    usual: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        callbacks=[*others, watch] if layout == "packed" else [*others, Padded(), watch],
        **{**usual, **quiet, **settings},
    )
    order: dict[str, Any] = {"seed": 0, "epoch": 0, "shuffle": False}
    trainer.fit(
        module, PairLoader(pairs, batch_size=batch_size, token_budget=token_budget, **order)
    )
    return watch
