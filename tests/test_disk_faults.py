"""What goes wrong on disk is one sentence, and the run goes on when the cause is gone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.killed_runs import SIGKILLED, Runs, differences, strike
from tpmm_pl.trajectory import TrajectoryStore

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="points inside a write are found through /proc"
)

LEARN = "tpmm_pl.callbacks.reference_merge:ReferenceMerge.learn"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(tmp_path_factory.mktemp("runs")) as runs:
        assert runs.fit("unbroken").code == 0, runs.log("unbroken").read_text()
        # behind the snapshot of the last round, and behind that of the second
        kills = {"closed": strike("SIGKILL", at=LEARN, calls=[3])}
        kills["open"] = strike("SIGKILL", at=LEARN, calls=[2])
        for name, how in kills.items():
            assert runs.fit(name, strike=how).code == SIGKILLED, runs.log(name).read_text()
        yield runs


def copied(runs: Runs, name: str, to: str) -> Path:
    """Copy a killed run; return the new one's trajectory."""
    shutil.copytree(runs.folder / name, runs.folder / to)
    return runs.root(to) / "trajectory"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        path.write_bytes(content)
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        wider = {name: torch.cat([tensor] * 2) for name, tensor in load_file(path).items()}
        save_file(wider, path)


def last_words(runs: Runs, name: str) -> str:
    lines = runs.log(name).read_text().strip().splitlines()
    assert not any(line.startswith(("Traceback", "--- Logging error")) for line in lines), lines
    return lines[-1]


@pytest.mark.parametrize(
    ("file", "how", "sentence"),
    [
        ("round_001/policy.safetensors", "missing", "is missing; restore it or start over"),
        ("round_001/policy.safetensors", "flipped", "is not the file that was written: its sha256"),
        ("round_001/policy.safetensors", "truncated", "is not the file that was written: its sha2"),
        ("round_002/policy.safetensors", "of another model", "is not the file that was written:"),
        ("round_002/pairs.parquet", "flipped", "is not the file that was written: its sha256 is"),
        ("round_000/fuse.parquet", "missing", "is missing; restore it or start over"),
        ("manifest.json", "truncated", "cannot be read (JSONDecodeError("),
    ],
)
def test_a_broken_file_of_a_closed_round_is_one_sentence(
    file: str, how: str, sentence: str, runs: Runs
) -> None:
    path = runs.root("closed") / "trajectory" / file
    whole = path.read_bytes()
    damage(path, how)
    assert runs.resume("closed").code == 2
    path.write_bytes(whole)
    words = last_words(runs, "closed")
    assert f"tpmm: error: {path} {sentence}" in words
    assert words.endswith("--overwrite")


def test_a_run_goes_on_when_its_files_are_restored(runs: Runs) -> None:
    trajectory = copied(runs, "closed", "healed")
    shutil.copytree(trajectory, trajectory.with_name("copy"))
    for file in ("round_000/policy.safetensors", "round_002/pairs.parquet"):
        damage(trajectory / file, "truncated")
        assert runs.resume("healed").code == 2
    shutil.rmtree(trajectory)
    trajectory.with_name("copy").rename(trajectory)
    assert runs.resume("healed").code == 0, last_words(runs, "healed")
    assert differences(runs, "healed", "unbroken") == []


def test_a_broken_file_can_be_left_behind_by_starting_over(runs: Runs) -> None:
    trajectory = copied(runs, "closed", "over")
    for file in ("round_001/policy.safetensors", "manifest.json"):
        damage(trajectory / file, "truncated")
    assert runs.fit("over", "--overwrite").code == 0, last_words(runs, "over")
    stores = [TrajectoryStore(runs.root(name) / "trajectory") for name in ("over", "unbroken")]
    assert [r.sha256 for r in stores[0].rounds] == [r.sha256 for r in stores[1].rounds]


@pytest.mark.parametrize(
    ("file", "how"), [("policy.safetensors", "flipped"), ("fuse.parquet", "missing")]
)
def test_a_round_whose_end_was_cut_off_is_made_again_from_its_checkpoint(
    file: str, how: str, runs: Runs
) -> None:
    name = f"{file}-{how}"
    path = copied(runs, "open", name) / "round_002" / file
    damage(path, how)
    assert runs.resume(name).code == 0, last_words(runs, name)
    assert differences(runs, name, "unbroken") == []


@pytest.mark.parametrize("how", ["truncated", "code"])
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(how: str, runs: Runs) -> None:
    path = runs.root("closed") / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    if how == "truncated":
        damage(path, how)
    else:
        torch.save({"state_dict": Touches(runs.folder / "touched")}, path)
    assert runs.resume("closed").code == 2
    path.write_bytes(whole)
    words = last_words(runs, "closed")
    assert f"tpmm: error: the checkpoint {path} cannot be read (" in words
    assert words.endswith("; restore it or start over with --overwrite")
    assert not (runs.folder / "touched").exists(), "code in a checkpoint was run"


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def disk(runs: Runs, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A run whose folder is a small disk; the run's name and the disk's size in KiB."""
    name, size = f"full-{request.param}", int(request.param)
    root = runs.root(name)
    root.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(root)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may mount no small disk")
    yield name, size
    subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize("disk", [64, 200, 400], indirect=True)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(disk: tuple[str, int], runs: Runs) -> None:
    name, _ = disk
    root = runs.root(name)
    assert runs.fit(name).code == 1, last_words(runs, name)
    words = last_words(runs, name)
    assert words.startswith(f"tpmm: error: {root}"), words
    assert "cannot be written (no space left on device, 0." in words
    assert words.endswith(" MB are free); make room, then go on with --ckpt_path last")
    subprocess.run(["mount", "-o", "remount,size=16m", str(root)], check=True)
    assert runs.resume(name).code == 0, last_words(runs, name)
    found = differences(runs, name, "unbroken")
    assert found == []
