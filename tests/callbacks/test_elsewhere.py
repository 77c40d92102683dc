"""The scripts of docs/callbacks.md, run as they stand there."""

from __future__ import annotations

import json
import re
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from tests.callbacks.recorder import Recorder
from tpmm_pl.callbacks import (
    MixedPairs,
    ModelExport,
    OfflinePairs,
    OnPolicyPairs,
    ReferenceMerge,
    RoundCallback,
    RoundCheckpoint,
    RoundEvaluation,
    TrajectorySnapshot,
)
from tpmm_pl.callbacks.round_end import STAGES
from tpmm_pl.merging import linear_merge
from tpmm_pl.toy.judges import LettersProxy
from tpmm_pl.trajectory import TrajectoryStore

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
CALLBACKS: list[RoundCallback] = [
    RoundCheckpoint(),
    TrajectorySnapshot(),
    OnPolicyPairs(LettersProxy()),
    OfflinePairs(),
    MixedPairs(OnPolicyPairs(LettersProxy()), OfflinePairs()),
    ReferenceMerge(),
    RoundEvaluation(),
    ModelExport(),
]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder, fit, init = Recorder(), Trainer.fit, Trainer.__init__
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }

    def quiet_init(self: Trainer, **settings: Any) -> None:
        init(self, **settings, **quiet, enable_checkpointing=False)

    def recorded_fit(self: Trainer, *args: Any, **settings: Any) -> None:
        self.callbacks.append(recorder)  # type: ignore[attr-defined]
        fit(self, *args, **settings)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "__init__", quiet_init)
    monkeypatch.setattr(Trainer, "fit", recorded_fit)
    return recorder


def run(script: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(script, str(PAGE), "exec"), names)
    return names


def merged(store: TrajectoryStore, rounds: int, weights: list[float]) -> dict[str, torch.Tensor]:
    states = [store.source(index) for index in range(rounds + 1)]
    return linear_merge(states, torch.tensor(weights, dtype=torch.float64))


def assert_equal(state: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_the_page_has_three_short_scripts() -> None:
    assert [len(script.splitlines()) <= 40 for script in SCRIPTS] == [True] * 3


def test_the_page_names_the_stages_in_their_order_and_who_runs_them() -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## What happens at a round's end")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section.partition("\n## ")[0], flags=re.M)
    assert tuple(stage for stage, _ in rows) == STAGES
    for stage, names in rows:
        offering = {type(c).__name__ for c in CALLBACKS if stage in c.stages()}
        assert set(re.findall(r"`(\w+)`", names)) == offering, stage


def test_in_a_foreign_module_the_next_policy_is_the_average_and_the_optimizer_fresh(
    recorder: Recorder,
) -> None:
    run(SCRIPTS[0])
    store = TrajectoryStore(Path("runs/finetuning/trajectory"))
    assert [record.round for record in store.rounds] == [0, 1, 2, 3]
    for record in store.rounds[:-1]:
        share = 1 / (record.round + 1)
        weights = [share] * (record.round + 1)
        assert_equal(recorder.starts[record.round], merged(store, record.round, weights))
        written = json.loads((store.folder(record.round) / "recipe.json").read_text())
        assert (written["strategy"], written["coefficients"]) == ("uniform", [weights])
    assert recorder.fresh == [True] * 3
    assert recorder.losses[2][-1] < recorder.losses[0][0]


def test_a_foreign_module_rebuilds_its_own_reference(recorder: Recorder) -> None:
    names = run(SCRIPTS[1])
    store = TrajectoryStore(Path("runs/own/trajectory"))
    reference = dict(names["trainer"].lightning_module.reference.named_parameters())
    assert_equal(reference, merged(store, 3, [1 / 4] * 4))
    # the next policy is the merge, and so is the reference
    for losses in recorder.losses:
        assert losses[0] == pytest.approx(log(2), abs=1e-5)
        assert losses[-1] != pytest.approx(log(2), abs=1e-3)


def test_a_bare_fabric_loop_keeps_a_trajectory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(SCRIPTS[2])
    store = TrajectoryStore(Path("runs/fabric/trajectory"))
    recipes = [record.recipe for record in store.rounds]
    assert [r.snapshots for r in recipes if r] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    # 0.6 of the newest, the rest of the reference before
    assert recipes[2] is not None
    assert recipes[2].coefficients[0] == pytest.approx((0.16, 0.24, 0.6))
    assert_equal(dict(names["policy"].named_parameters()), dict(store.source(3)))


def test_in_a_bare_fabric_loop_the_next_policy_is_the_merge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(SCRIPTS[2].replace("final=round_index == ROUNDS", "final=False"))
    store = TrajectoryStore(Path("runs/fabric/trajectory"))
    state = dict(names["policy"].named_parameters())
    assert_equal(state, merged(store, 3, [0.4**3, 0.6 * 0.4**2, 0.6 * 0.4, 0.6]))
    assert not names["optimizer"].state
