"""``tpmm merge`` on the snapshots of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.commands.saved_models import assert_close, save, weighted, weights_of
from tests.commands.test_experts import refused, run
from tests.models.tiny import tiny_llama
from tpmm_pl.models.weights import save_policy
from tpmm_pl.trajectory import TrajectoryStore


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(tiny_llama(seed=seed), root / f"m{seed}") for seed in range(3)]


@pytest.fixture
def trajectory(models: list[Path], tmp_path: Path) -> Path:
    store = TrajectoryStore(tmp_path / "run" / "trajectory")
    for seed in range(3):
        save_policy(tiny_llama(seed=seed), store, seed)
    save(tiny_llama(seed=2), tmp_path / "run" / "export" / "last")
    return tmp_path / "run"


def test_snapshots_of_a_run_are_merged(
    trajectory: Path, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [weights_of(folder) for folder in models]
    assert run("merge", trajectory, "--out", tmp_path / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == [0, 1, 2]
    assert_close(weights_of(tmp_path / "a"), weighted(states, [1 / 3] * 3))
    assert run("merge", trajectory, "--rounds", "0,2", "--out", tmp_path / "b") == 0
    assert_close(weights_of(tmp_path / "b"), weighted([states[0], states[2]], [0.5, 0.5]))
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    sentence = refused(capsys, "merge", trajectory, "--rounds", "0,7", "--out", tmp_path / "c")
    assert "no snapshot of round 7" in sentence
    sentence = refused(capsys, "merge", trajectory, "--rounds", "1", "--out", tmp_path / "c")
    assert "gives the snapshots [1]; a merge needs two or more" in sentence


def test_an_unfinished_run_takes_the_configuration_of_its_start(
    trajectory: Path, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((trajectory / "export").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    sentence = refused(capsys, "merge", trajectory, "--out", tmp_path / "a")
    assert "has no export/last, whose configuration is needed; finish it" in sentence
    TrajectoryStore(trajectory / "trajectory").describe_model({"name": str(models[0])})
    assert run("merge", trajectory, "--out", tmp_path / "a") == 0
    states = [weights_of(folder) for folder in models]
    assert_close(weights_of(tmp_path / "a"), weighted(states, [1 / 3] * 3))
