"""Whole runs of policies with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.callbacks.letters_run import FUSION, fit, letters_pairs
from tpmm_pl.callbacks import (
    ModelExport,
    ReferenceMerge,
    RoundEvaluation,
    TrajectorySnapshot,
)
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.weights import materialise
from tpmm_pl.rounds import one_hot
from tpmm_pl.toy.judges import LettersGold
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError

IDS = torch.arange(3, 27).reshape(3, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("start")
    policy = LettersPolicy(
        hidden=16, layers=2, heads=2, ffn=32, steps=30, batch_size=16, cache_dir=cache
    )
    policy.prepare()
    export_model(policy.load_model(), policy.load_tokenizer(), None, cache / "model")
    return cache / "model"


def run(
    root: Path,
    model: Path,
    strategy: str,
    *,
    rounds: int = 2,
    start_from: list[str] | None = None,
    **lora: Any,
) -> TrajectoryStore:
    source = PretrainedPolicy(
        str(model), lora=LoraSettings(**{"r": 2, "alpha": 4, **lora}), gradient_checkpointing=True
    )
    return fit(
        root,
        source,
        [
            TrajectorySnapshot(start_from or []),
            ReferenceMerge(strategy, fusion=FUSION, guard_kl=None, ship_steps=1),
            letters_pairs(),
            RoundEvaluation(LettersGold(), max_new_tokens=4),
            ModelExport(),
        ],
        rounds=rounds,
    )


def test_a_run_of_adapters_with_magnitudes_keeps_to_single_snapshots(
    model: Path, tmp_path: Path
) -> None:
    store = run(tmp_path, model, "last", use_dora=True)
    record = store.record(2)
    assert set(record.ship) == {"merge", "chosen"}
    assert any("magnitude" in name for name in store.source(2))
    for name in ("last", "merged"):
        base = PretrainedPolicy(str(model)).load_model()
        back = PeftModel.from_pretrained(base, tmp_path / "export" / name)
        policy = PretrainedPolicy(str(model), lora=LoraSettings(r=2, alpha=4, use_dora=True))
        ours: Any = policy.load_model()
        materialise(ours, store, one_hot(2))
        with torch.no_grad():
            assert torch.equal(back(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("strategy", ["uniform", "learned"])
def test_magnitudes_are_refused_with_a_merge_before_the_first_round(
    strategy: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a merge of several adapters with use_dora is no adapter"):
        run(tmp_path, model, strategy, use_dora=True)
    assert not (tmp_path / "trajectory").exists(), "nothing has run"


def test_a_run_goes_on_from_given_adapters_as_the_run_that_made_them(
    model: Path, tmp_path: Path
) -> None:
    unbroken = run(tmp_path / "unbroken", model, "last", rounds=3)
    given = [str(unbroken.folder(index) / "adapter") for index in (1, 2)]
    store = run(tmp_path / "given", model, "last", rounds=3, start_from=given)
    assert [r.sha256 for r in store.rounds] == [r.sha256 for r in unbroken.rounds]
