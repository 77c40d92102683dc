"""Losses along a fit on fixed pairs of the letters task, packed and padded."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.callbacks.letters_run import context_of, letters_data, letters_pairs, round_pairs
from tests.modules.steps import WHOLE, fit
from tpmm_pl.callbacks import TrajectorySnapshot, finish_round
from tpmm_pl.data.batching import micro_batches
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.types import Pair

# that of the quickstart
ADAMW = partial(torch.optim.AdamW, lr=3.5e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
BATCH, CUT = 8, 60


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LettersPolicy:
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "steps": 60, "batch_size": 32}
    policy = LettersPolicy(**sizes, cache_dir=tmp_path_factory.mktemp("start"))
    policy.prepare()
    return policy


@pytest.fixture(scope="module")
def pairs(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Made once by the start, and scored under it."""
    seed_everything(0, verbose=False)
    context = context_of(
        tmp_path_factory.mktemp("run"), start, data=letters_data(prompts_per_round=96)
    )
    finish_round([TrajectorySnapshot(), letters_pairs(max_new_tokens=12)], context)
    return list(round_pairs(context.store, 0))


def losses(start: LettersPolicy, pairs: list[Pair], steps: int, **way: Any) -> list[float]:
    given = (pairs * (steps * BATCH // len(pairs) + 1))[: steps * BATCH]
    seed_everything(0, verbose=False)
    watch = fit(DPOModule(start, ADAMW), given, batch_size=BATCH, **way)
    assert len(watch.metrics) == steps
    return [step["loss"] for step in watch.metrics]


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_curve_is_the_same_in_every_layout(
    steps: int, start: LettersPolicy, pairs: list[Pair]
) -> None:
    assert len(micro_batches(pairs[:BATCH], CUT)) > 1
    padded = losses(start, pairs, steps, layout="padded")
    packed = losses(start, pairs, steps, token_budget=WHOLE)
    cut = losses(start, pairs, steps, token_budget=CUT)
    assert max(abs(loss - padded[0]) for loss in padded) > 0.02, "the policy has moved"
    differences = [
        max(abs(a - b) for a, b in zip(way, padded, strict=True)) for way in (packed, cut)
    ]
    assert max(differences) < 1e-4
