from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from peft import PeftModel

from tests.callbacks.letters_run import FUSION, Fixed, context_of, fit, letters_pairs
from tests.callbacks.recorder import Recorder
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import (
    ModelExport,
    ReferenceMerge,
    RoundCheckpoint,
    RoundContext,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.callbacks.model_export import best_round
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.files import file_sha256
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError


def test_a_snapshot_is_the_policy_bit_for_bit(start: LettersPolicy, tmp_path: Path) -> None:
    context = context_of(tmp_path, start, 4)
    finish_round([TrajectorySnapshot()], context)
    store = TrajectoryStore(tmp_path / "trajectory")
    record, source = store.record(4), store.source(4)
    assert record.snapshot == "round_004/policy.safetensors"
    assert record.sha256 == file_sha256(store.root / record.snapshot)
    assert dict(context.policy.named_parameters()).keys() == source.keys()
    for name, parameter in context.policy.named_parameters():
        assert torch.equal(source[name], parameter), name


@pytest.mark.parametrize("round_index", [0, 1])
def test_the_start_is_described_once(
    round_index: int, start: LettersPolicy, tmp_path: Path
) -> None:
    receiver = SimpleNamespace(policy_source=start)
    context = context_of(tmp_path, start, round_index, receiver=receiver)
    finish_round([TrajectorySnapshot()], context)
    described = TrajectoryStore(tmp_path / "trajectory").model
    assert described == ({} if round_index else start.describe())


def test_the_snapshot_of_an_adapter_is_one_that_peft_loads(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    source = PretrainedPolicy(str(tmp_path / "model"), lora=LoraSettings(r=2, alpha=4))
    context = context_of(tmp_path, source)
    for name, parameter in context.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    finish_round([TrajectorySnapshot()], context)
    folder = context.store.folder(0) / "adapter"
    assert context.store.record(0).snapshot == "round_000/adapter/adapter_model.safetensors"
    back = PeftModel.from_pretrained(tiny_llama(), folder)
    ids = torch.arange(2, 14).reshape(2, 6)
    assert torch.equal(back(ids).logits, context.policy(ids).logits)


def kept_files(store: TrajectoryStore) -> list[int]:
    return [r.round for r in store.rounds if list(store.folder(r.round).glob("*.safetensors"))]


def learned() -> ReferenceMerge:
    return ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=2)


def test_a_run_that_keeps_two_snapshots_merges_and_ships_those(
    start: LettersPolicy, tmp_path: Path
) -> None:
    stages = [TrajectorySnapshot(keep_last=2), learned(), letters_pairs(), RoundCheckpoint()]
    store = fit(tmp_path, start, stages, rounds=4)
    assert store.kept(4) == (0, 3, 4)
    assert [record.snapshot is None for record in store.rounds] == [False, True, True, False, False]
    # the last round stays open: what it dropped is deleted when more rounds are trained
    assert kept_files(store) == [0, 2, 3, 4]
    assert [record.recipe.snapshots for record in store.rounds if record.recipe] == [
        (0,),
        (0, 1),
        (0, 1, 2),
        (0, 2, 3),
        (0, 3, 4),
    ]
    last = store.record(4)
    assert set(last.ship) == {"merge", "learned", "chosen"}
    assert last.ship["learned"].snapshots == (0, 3, 4)
    assert store.record(1).notes == {"snapshot": "not kept"}
    assert all(record.sha256 for record in store.rounds)
    assert TrajectoryStore(store.root).rounds == store.rounds


@pytest.mark.parametrize("stage", ["fuse", "checkpoint", "retain"])
def test_a_killed_run_needs_no_snapshot_that_was_deleted(
    stage: str, start: LettersPolicy, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(context: RoundContext) -> None:
        if context.round_index == 3:
            raise Killed

    def run(root: Path, *first: Callback, ckpt_path: Path | None = None) -> TrajectoryStore:
        stages = [TrajectorySnapshot(keep_last=1), learned(), letters_pairs(), RoundCheckpoint()]
        return fit(root, start, [*first, *stages], rounds=4, ckpt_path=ckpt_path)

    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(tmp_path / "killed", Fixed(stage, kill))
    cut_off = TrajectoryStore(tmp_path / "killed" / "trajectory")
    assert cut_off.kept(3) == (0, 3)
    assert kept_files(cut_off) == [0, 2, 3], "a checkpoint may still go back before the deletion"
    store = run(tmp_path / "killed", ckpt_path=tmp_path / "killed" / CHECKPOINT)
    assert [r.sha256 for r in store.rounds] == [r.sha256 for r in unbroken.rounds]
    assert [r.recipe for r in store.rounds] == [r.recipe for r in unbroken.rounds]
    assert store.kept(4) == unbroken.kept(4) == (0, 4)


def test_the_best_round_is_kept(start: LettersPolicy, tmp_path: Path) -> None:
    divergence = [0.0, 2.0, 4.0, 6.0, 8.0, 3.0, 9.0]
    store = TrajectoryStore(tmp_path / "trajectory")
    callback = TrajectorySnapshot(keep_last=1, keep_best=5.0)
    found = []
    for index, kl in enumerate(divergence):
        context = context_of(tmp_path, start, index, store=store)
        finish_round([callback], context)
        store.update(index, metrics={"kl/policy_sft/in_domain": kl})
        found.append(store.kept(index))
    assert found == [(0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 2, 5), (0, 5, 6)]
    assert kept_files(store) == [0, 5, 6]
    assert best_round(store.rounds, 5.0) == 5


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (ReferenceMerge("uniform"), "but reference.strategy uniform merges the snapshots of all"),
        (ReferenceMerge("ema"), "but reference.strategy ema merges the snapshots of all rounds"),
        (ReferenceMerge("window", window=3), "but reference.window is 3; raise keep_last to that"),
        (ReferenceMerge("last", ship="average"), "but reference.ship average merges the snapshots"),
        (ModelExport(best_kl=9.0), r"but export.best_kl 9.0 and snapshot.keep_best 5.0 would"),
    ],
)
def test_what_needs_all_snapshots_is_refused_at_the_start(
    reference: Callback, sentence: str, start: LettersPolicy, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(InputError, match=rf"^snapshot.keep_last is 2, {sentence}"):
        fit(tmp_path, start, [TrajectorySnapshot(keep_last=2), reference, recorder])
    assert recorder.losses == []
    assert not (tmp_path / "trajectory").exists()


@pytest.mark.parametrize("strategy", ["last", "initial", "window"])
def test_other_strategies_run_on_the_kept_snapshots(
    strategy: str, start: LettersPolicy, tmp_path: Path
) -> None:
    reference = ReferenceMerge(strategy, window=2, ship_steps=1)
    callbacks = [TrajectorySnapshot(keep_last=2), reference, letters_pairs()]
    store = fit(tmp_path, start, callbacks, rounds=3)
    assert store.kept(3) == (0, 2, 3)


def test_nothing_kept_is_refused() -> None:
    with pytest.raises(InputError, match=r"snapshot\.keep_last is 0; it must be at least 1"):
        TrajectorySnapshot(keep_last=0)


def test_a_dropped_adapter_is_deleted(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    source = PretrainedPolicy(str(tmp_path / "model"), lora=LoraSettings(r=2, alpha=4))
    store = TrajectoryStore(tmp_path / "trajectory")
    for index in range(3):
        finish_round(
            [TrajectorySnapshot(keep_last=1)], context_of(tmp_path, source, index, store=store)
        )
    found = [(store.folder(index) / "adapter").exists() for index in range(3)]
    assert found == [True, False, True]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hold_pieces_of_tensors_are_refused(strategy: type) -> None:
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy), world_size=2, callbacks=[])
    with pytest.raises(InputError, match=r"need whole tensors, .*fsdp2\.yaml"):
        TrajectorySnapshot().setup(trainer, LightningModule(), "fit")
    trainer.world_size = 1
    TrajectorySnapshot().setup(trainer, LightningModule(), "fit")
