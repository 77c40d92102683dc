"""The reward models of the letters task from the command line: train, stop, resume, consolidate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification

from tpmm_pl.callbacks import FitCheckpoint, RewardExport
from tpmm_pl.cli import main
from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.judges import RewardModelJudge
from tpmm_pl.models.load import load_reward_model
from tpmm_pl.moe.convert import consolidate, moe_layers
from tpmm_pl.toy.letters import EOS, TOKEN_IDS
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Completion, Prompt

Run = Callable[..., int]

SMALL = [
    "--data.pairs", "96", "--data.batch_size", "16", "--data.evaluation_pairs", "32",
]  # fmt: skip
START = {
    "class_path": "tpmm_pl.toy.start.LettersPolicy",
    "init_args": {"hidden": 16, "layers": 2, "ffn": 32, "steps": 3},
}
STOP_AFTER = 7
"""In the second epoch, one step behind a checkpoint."""


@pytest.fixture
def tpmm(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(config: str, root: Path, *arguments: object) -> int:
        flags = ["--config", f"configs/{config}.yaml", "--trainer.default_root_dir", str(root)]
        monkeypatch.setattr(sys, "argv", ["tpmm", "fit", *flags, *SMALL, *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


@pytest.fixture
def dense(tpmm: Run, tmp_path: Path) -> Path:
    start = {**START, "init_args": {**START["init_args"], "cache_dir": str(tmp_path / "sft")}}  # type: ignore[dict-item]
    flags = ["--model.reward.start", str(start).replace("'", '"'), "--trainer.max_epochs", "1"]
    assert tpmm("reward_dense", tmp_path / "dense", *flags) == 0
    return tmp_path / "dense" / "export" / "reward"


def moe(tpmm: Run, dense: Path, root: Path, *arguments: object) -> int:
    few = ["--model.reward.moe.experts", 4, "--model.reward.moe.active", 3]
    name = ["--model.reward.name_or_path", dense, "--experts.every_n_steps", 2]
    return tpmm("reward_moe", root, *name, *few, *arguments)


def test_a_fit_ended_within_an_epoch_is_measured_at_its_last_step(
    tpmm: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert moe(tpmm, dense, tmp_path / "moe", "--trainer.max_steps", 4) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:] if line]
    assert rows == [["1", "4"]]


def test_dense_to_experts_to_dense(
    tpmm: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe(tpmm, dense, tmp_path / "moe") == 0
    experts = tmp_path / "moe" / "export" / "reward"
    assert (experts / "moe.json").is_file()
    events = EventAccumulator(str(tmp_path / "moe" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"experts/00/load_00", "experts/01/load_cv", "experts/01/gate_entropy"} <= scalars
    assert {"loss", "accuracy", "margin", "balance_loss", "eval/accuracy/in_domain"} <= scalars
    name = ["--model.reward.name_or_path", experts]
    assert tpmm("reward_consolidate", tmp_path / "merged", *name) == 0
    printed = capsys.readouterr().out
    assert "epoch  step   accuracy" in printed
    merged = tmp_path / "merged" / "export" / "reward"
    recipe = json.loads((tmp_path / "merged" / "recipe.json").read_text())
    by_hand, _ = load_reward_model(str(experts))
    consolidate(by_hand, torch.tensor(recipe["coefficients"]))
    written = AutoModelForSequenceClassification.from_pretrained(merged)
    for file, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(written.state_dict()[file], tensor, atol=1e-6, rtol=0)
    before = AutoModelForSequenceClassification.from_pretrained(dense).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(merged).state_dict()
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_experts_stopped_in_an_epoch_end_at_the_same_weights(
    tpmm: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moe(tpmm, dense, tmp_path / "whole", "--checkpoint.every_n_steps", 2) == 0
    keep = ["--checkpoint.every_n_steps", 2]
    counted = FitCheckpoint.on_train_batch_end

    def killed(self: FitCheckpoint, trainer: Any, *rest: Any) -> None:
        counted(self, trainer, *rest)
        if trainer.global_step == STOP_AFTER:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(FitCheckpoint, "on_train_batch_end", killed)
        assert moe(tpmm, dense, tmp_path / "cut", *keep) == 1
    assert not (tmp_path / "cut" / "export").exists()
    assert moe(tpmm, dense, tmp_path / "cut", *keep) == 2  # in use: how to go on is said
    assert moe(tpmm, dense, tmp_path / "cut", *keep, "--ckpt_path", "last") == 0
    for file in sorted((tmp_path / "whole" / "export" / "reward").glob("*.safetensors")):
        whole, cut = load_file(file), load_file(tmp_path / "cut" / "export" / "reward" / file.name)
        assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_a_run_that_ended_before_its_export_makes_it_on_the_resume(
    tpmm: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RewardExport, *_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(RewardExport, "on_fit_end", full)
        assert moe(tpmm, dense, tmp_path / "moe") == 1
    assert moe(tpmm, dense, tmp_path / "moe", "--ckpt_path", "last") == 0
    assert (tmp_path / "moe" / "export" / "reward" / "moe.json").is_file()


def test_experts_train_in_bfloat16_with_their_router_in_float32(
    tpmm: Run, dense: Path, tmp_path: Path
) -> None:
    assert moe(tpmm, dense, tmp_path / "moe", "--trainer.precision", "bf16-true") == 0
    model, _ = load_reward_model(str(tmp_path / "moe" / "export" / "reward"))
    assert all(layer.router.weight.dtype == torch.float32 for layer in moe_layers(model).values())


def test_a_reward_model_that_is_not_there_is_told(
    tpmm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe(tpmm, tmp_path / "nowhere" / "at" / "all", tmp_path / "moe") == 2
    assert "no model folder" in capsys.readouterr().err


def test_a_trained_reward_model_labels_the_pairs_of_iterative_dpo(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = "configs/overlays/quickstart_reward.yaml"
    small = [
        "--model.policy.hidden", "16", "--model.policy.layers", "2", "--model.policy.ffn", "32",
        "--model.policy.steps", "3", "--model.policy.cache_dir", str(tmp_path / "sft"),
        "--model.rounds", "1", "--data.prompts_per_round", "8", "--data.start_fuse_prompts", "8",
        "--data.fuse_prompts_per_round", "8", "--data.evaluation_prompts", "8",
        "--data.batch_size", "8", "--reference.strategy", "last",
        "--reference.ship_steps", "0",
    ]  # fmt: skip
    judges = ["--pairs.annotator.name_or_path", str(dense)]
    judges += ["--evaluation.proxy.name_or_path", str(dense)]
    root = ["--trainer.default_root_dir", str(tmp_path / "loop")]
    flags = ["--config", "configs/quickstart.yaml", "--config", overlay, *small, *judges, *root]
    monkeypatch.setattr(sys, "argv", ["tpmm", "fit", *flags])
    main()
    store = TrajectoryStore(tmp_path / "loop" / "trajectory")
    pairs = read_pairs(store.path(str(store.record(0).pairs)))
    judge = RewardModelJudge(str(dense), device="cpu")
    for pair in pairs:
        prompt = Prompt(pair.prompt_id, pair.prompt, pair.prompt_ids)
        ended = pair.chosen_ids[-1] == TOKEN_IDS[EOS]
        (score,) = judge([Completion(prompt, 0, pair.chosen_ids, pair.chosen, ended, 0.0)])
        assert score == pytest.approx(pair.score_chosen, abs=1e-5)
        assert pair.score_chosen > pair.score_rejected
    assert store.record(1).metrics["proxy/in_domain"] != store.record(1).metrics["gold/in_domain"]
