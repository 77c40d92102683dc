"""A real run that SIGKILL or another signal ends, anywhere, resumes to the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.killed_runs import SIGKILLED, Runs, differences, leftovers, strike
from tpmm_pl.trajectory import TrajectoryStore

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="points inside a write are found through /proc"
)

RANDOM_KILLS = 60
UPDATE = "tpmm_pl.modules.packed_steps:PackedSteps.on_before_optimizer_step"
FUSION = "tpmm_pl.modules.fusion:FusionWeights.training_step"
SAMPLING = "tpmm_pl.models.decoding:_CachedForward.__call__"
RECORD = "tpmm_pl.trajectory:TrajectoryStore.update"

KILLS: dict[str, dict[str, Any]] = {
    "mid_batch": {"at": UPDATE, "calls": [6]},
    "mid_snapshot": {"write": r"round_002/\.policy"},
    "mid_fusion": {"at": FUSION, "calls": [7]},
    "mid_generation": {"at": SAMPLING, "calls": [80]},
    "mid_checkpoint": {"write": r"checkpoints/\.last", "calls": [4]},
    "between_stages": {"at": RECORD, "calls": [16], "after": True},
}
MORE_KILLS: dict[str, dict[str, Any]] = {
    "mid_first_checkpoint": {"write": r"checkpoints/\.last"},
    "mid_start": {"at": "tpmm_pl.toy.start:_store"},
    "mid_config": {"write": r"/\.config"},
    "mid_pairs": {"write": r"round_001/\.pairs"},
    "mid_fuse_pairs": {"write": r"round_002/\.fuse"},
    "mid_manifest": {"write": r"\.manifest", "calls": [14]},
    "mid_recipe": {"write": r"round_002/\.recipe"},
    "mid_log_probabilities": {"write": r"\.reference"},
    "mid_export": {"write": r"run/export/\.", "calls": [4]},
    "mid_mark": {"write": r"/\.finished"},
    "before_the_optimizer_is_reset": {
        "at": "tpmm_pl.callbacks.reference_merge:ReferenceMerge.set_next_policy",
        "calls": [2],
    },
}
SLURM = {
    **{"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "letters"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}
"""Of a job's one process; Lightning would write a checkpoint of its own and requeue the job."""
SIGNALS: dict[str, dict[str, Any]] = {
    "before_the_fit": {"at": "tpmm_pl.toy.start:_store"},
    "before_the_first_round": {"at": SAMPLING, "calls": [3]},
    "in_a_checkpoint": {"write": r"checkpoints/\.last", "calls": [3]},
    "in_the_last_stage_of_a_round": {
        "at": "tpmm_pl.callbacks.round_checkpoint:RoundCheckpoint.save",
        "calls": [3],
    },
    "before_the_last_stages": {"at": SAMPLING, "calls": [100]},
    "behind_the_fit": {"at": "tpmm_pl.commands.train:gold_proxy_figure"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(tmp_path_factory.mktemp("runs")) as runs:
        ended = runs.fit("unbroken")
        assert ended.code == 0, runs.log("unbroken").read_text()
        yield runs


@pytest.fixture(scope="module")
def whole_seconds(runs: Runs) -> float:
    """Return the processor time of a run; the first one has made the start, too."""
    return runs.fit("measured").seconds


def own_start(name: str, runs: Runs) -> tuple[str, str]:
    """Return the flag by which a run makes its start itself."""
    return "--model.init_args.policy.init_args.cache_dir", str(runs.folder / name / "start")


def assert_goes_on(runs: Runs, name: str, *flags: str) -> None:
    ended = runs.resume(name, *flags)
    assert ended.code == 0, runs.log(name).read_text()
    assert differences(runs, name, "unbroken") == []
    assert leftovers(runs.root(name)) == []


@pytest.mark.parametrize(
    "kill", [*KILLS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_KILLS)]
)
def test_a_killed_run_goes_on_to_the_same_weights(kill: str, runs: Runs) -> None:
    point = strike("SIGKILL", **(KILLS | MORE_KILLS)[kill])
    flags = own_start(kill, runs) if kill == "mid_start" else ()
    assert runs.fit(kill, *flags, strike=point).code == SIGKILLED
    if kill == "mid_checkpoint":
        (beside,) = leftovers(runs.root(kill))
        whole = runs.root(kill) / "checkpoints" / "last.ckpt"
        assert 0 < beside.stat().st_size < whole.stat().st_size
    assert_goes_on(runs, kill, *flags)


@pytest.mark.parametrize(
    "stage",
    [
        "tpmm_pl.callbacks.reference_merge:ReferenceMerge.make_reference",
        pytest.param(
            "tpmm_pl.callbacks.round_evaluation:RoundEvaluation.evaluate_ship",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_again_while_it_makes_up_for_a_stage_goes_on(stage: str, runs: Runs) -> None:
    name = stage.rpartition(".")[2]
    first = 3 if name == "make_reference" else 1
    point = strike("SIGKILL", at=stage, calls=[first])
    assert runs.fit(name, strike=point).code == SIGKILLED
    again = strike("SIGKILL", at=stage)
    assert runs.resume(name, strike=again).code == SIGKILLED
    assert_goes_on(runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RANDOM_KILLS))
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_weights(
    number: int, runs: Runs, whole_seconds: float
) -> None:
    name = f"random_{number}"
    if runs.fit(name, seconds=random.Random(number).uniform(0.0, whole_seconds)).code:
        assert_goes_on(runs, name)


@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGUSR1"])
def test_a_signal_within_a_round_leaves_a_checkpoint_of_the_batch(name: str, runs: Runs) -> None:
    run = f"{name}_in_a_batch"
    ended = runs.fit(run, strike=strike(name, at=UPDATE, calls=[6]), environment=SLURM)
    assert ended.code == 143, runs.log(run).read_text()
    (seen,) = runs.starts(run)
    assert len(seen) == 6
    assert_goes_on(runs, run)
    first, second = runs.starts(run)
    assert first + second == runs.starts("unbroken")[0]
    assert not list((runs.root(run)).rglob("hpc_ckpt*"))


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_within_a_stage_ends_the_run_behind_it(name: str, runs: Runs) -> None:
    run = f"{name}_in_a_stage"
    # the second signal comes while the first one's stage still runs
    assert runs.fit(run, strike=strike(name, at=FUSION, calls=[7, 8])).code == 143
    record = TrajectoryStore(runs.root(run) / "trajectory").rounds[-1]
    assert record.round == 2
    assert list(record.seconds) == ["snapshot", "fuse_pairs", "fuse"]
    assert_goes_on(runs, run)


@pytest.mark.slow
@pytest.mark.parametrize("where", SIGNALS)
def test_a_signal_anywhere_ends_the_run_and_loses_nothing(where: str, runs: Runs) -> None:
    run = f"anywhere_{where}"
    flags = own_start(run, runs)
    assert runs.fit(run, *flags, strike=strike("SIGTERM", **SIGNALS[where])).code == 143
    assert_goes_on(runs, run, *flags)


@pytest.mark.slow
def test_a_signal_within_the_last_stage_lets_the_run_end(runs: Runs) -> None:
    run, at = "last_stage", "tpmm_pl.callbacks.model_export:ModelExport.export"
    assert runs.fit(run, strike=strike("SIGTERM", at=at)).code == 0
    assert differences(runs, run, "unbroken") == []
