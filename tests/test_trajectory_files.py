"""No file of a trajectory is trusted blindly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.test_trajectory import MERGE, state, store_of_two
from tpmm_pl import tensor_files, trajectory
from tpmm_pl.files import file_sha256
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "of another model":
        path.unlink()
        TrajectoryStore(path.parent / "other").add_snapshot(0, {"v": torch.ones(3)})
        (path.parent / "other" / "round_000" / "policy.safetensors").rename(path)
    else:
        content[-1] ^= 1
        path.write_bytes(content)


DAMAGE = ["missing", "truncated", "flipped", "of another model"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_broken_snapshot_is_never_handed_out(how: str, tmp_path: Path) -> None:
    path = store_of_two(tmp_path).folder(1) / "policy.safetensors"
    copy = shutil.copy(path, tmp_path / "copy")
    damaged(path, how)
    reason = "is missing" if how == "missing" else "is not the file that was written: its sha256"
    sentence = rf"^{path} {reason}.*; restore it or start over with --overwrite$"
    with pytest.raises(InputError, match=sentence):
        TrajectoryStore(tmp_path).source(1)
    with pytest.raises(InputError, match=sentence):
        TrajectoryStore(tmp_path).verify(1)
    assert TrajectoryStore(tmp_path).source(0)["w"].unique().tolist() == [0.0]
    shutil.copy(copy, path)
    TrajectoryStore(tmp_path).verify(1)


def test_a_round_that_is_not_closed_is_forgotten_for_a_broken_file(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    damaged(store.folder(1) / "policy.safetensors", "flipped")
    back = TrajectoryStore(tmp_path)
    back.verify(closed=0)
    assert [record.round for record in back.rounds] == [0]
    assert back.rounds == TrajectoryStore(tmp_path).rounds
    assert back.source(0)["w"].unique().tolist() == [0.0]


def test_files_are_hashed_once_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def check(path: Path, digest: str) -> str | None:
        hashed.append(path.parent.name)
        return tensor_files.check_sha256(path, digest)

    monkeypatch.setattr(trajectory, "check_sha256", check)
    store = store_of_two(tmp_path)
    store.source(0)
    store.verify(1)
    assert hashed == [], "it has just hashed them while writing"
    back = TrajectoryStore(tmp_path)
    for _ in range(2):
        back.source(1)
        back.path("round_001/policy.safetensors")
    assert hashed == ["round_001"]
    back.verify(1)
    back.source(0)
    assert hashed == ["round_001", "round_000"]


def test_pairs_are_checked_where_their_hash_is_known(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    for name in ("pairs", "fuse"):
        file = store.folder(1) / f"{name}.parquet"
        file.write_bytes(b"some pairs")
        hashes = {f"{name}_sha256": file_sha256(file)}
        store.update(1, **{name: store.relative(file)}, **hashes)
        assert TrajectoryStore(tmp_path).path(f"round_001/{name}.parquet") == file
        file.write_bytes(b"sOme pairs")
        with pytest.raises(InputError, match=rf"{name}\.parquet is not the file that was written"):
            TrajectoryStore(tmp_path).path(f"round_001/{name}.parquet")
        store.update(1, **{f"{name}_sha256": None})
        assert TrajectoryStore(tmp_path).path(f"round_001/{name}.parquet") == file


def test_a_manifest_from_before_pairs_were_hashed_is_read(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    content = json.loads(store.manifest.read_text())
    for record in content["rounds"]:
        del record["pairs_sha256"], record["fuse_sha256"]
    store.manifest.write_text(json.dumps(content))
    assert TrajectoryStore(tmp_path).rounds == store.rounds


def test_a_large_snapshot_is_several_files_and_reads_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tensor_files.write_tensors
    monkeypatch.setattr(
        trajectory, "write_tensors", lambda path, state: write(path, state, largest=30)
    )
    record = store_of_two(tmp_path).record(1)
    assert record.snapshot == "round_001/policy.safetensors.index.json"
    source = TrajectoryStore(tmp_path).source(1)
    assert source["w"].tolist() == [[1.0] * 3] * 2
    assert source["steps"].tolist() == [7]
    damaged(tmp_path / "round_001" / "policy-00002-of-00002.safetensors", "flipped")
    with pytest.raises(InputError, match=r"policy-00002-of-00002\.safetensors is not the file"):
        TrajectoryStore(tmp_path).source(1)


OUTSIDE = "leads out of .*, whose records may name only what lies in it; restore"


@pytest.mark.parametrize("field", ["snapshot", "pairs", "fuse"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "round_001/../../secret"])
def test_a_manifest_that_names_files_elsewhere_is_refused(
    name: str, field: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    store = store_of_two(tmp_path / "trajectory")
    content = json.loads(store.manifest.read_text())
    content["rounds"][1][field] = name
    store.manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match=OUTSIDE):
        TrajectoryStore(store.root)
    with pytest.raises(InputError, match=OUTSIDE):
        store.path(name)


@pytest.mark.parametrize("place", ["round_001", "round_001/policy.safetensors"])
def test_a_link_that_leads_out_is_refused(place: str, tmp_path: Path) -> None:
    store = store_of_two(tmp_path / "trajectory")
    linked = store.root / place
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=OUTSIDE):
        TrajectoryStore(store.root)


def test_a_link_within_the_trajectory_and_a_linked_trajectory_are_fine(tmp_path: Path) -> None:
    store = store_of_two(tmp_path / "disk")
    file = store.folder(1) / "policy.safetensors"
    file.rename(store.folder(0) / "moved.safetensors")
    file.symlink_to(store.folder(0) / "moved.safetensors")
    (tmp_path / "trajectory").symlink_to(tmp_path / "disk")
    assert TrajectoryStore(tmp_path / "trajectory").source(1)["w"].unique().tolist() == [1.0]


def test_a_record_of_no_round_is_refused(tmp_path: Path) -> None:
    manifest = store_of_two(tmp_path).manifest
    manifest.write_text(manifest.read_text().replace('"round": 1', '"round": "../1"'))
    with pytest.raises(InputError, match=r"manifest\.json cannot be read .*'\.\./1' is no round"):
        TrajectoryStore(tmp_path)


def test_a_dropped_snapshot_leaves_its_hash_and_what_it_was_merged_into(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    store.add_snapshot(2, state(2.0))
    store.drop_snapshot(1)
    file = store.folder(1) / "policy.safetensors"
    assert file.exists(), "until the manifest that no longer names it has a checkpoint"
    assert TrajectoryStore(tmp_path).rounds == store.rounds
    assert store.kept(2) == (0, 2)
    assert store.kept(1) == (0,)
    store.delete_dropped()
    assert not file.exists()
    back = TrajectoryStore(tmp_path)
    back.verify(2)
    assert back.record(1).sha256 is not None
    assert back.record(1).recipe == MERGE
    assert back.record(1).notes == {"snapshot": "not kept"}
    with pytest.raises(InputError, match=r"no snapshot of round 1 in .*; there are \[0, 2\]"):
        back.source(1)
    back.add_snapshot(1, state(1.0))
    back.delete_dropped()
    assert back.kept(2) == (0, 1, 2), "a round that was trained again"


def test_deleting_does_not_follow_a_link_out_of_the_trajectory(tmp_path: Path) -> None:
    store = store_of_two(tmp_path / "trajectory")
    store.drop_snapshot(1)
    store.folder(1).rename(tmp_path / "elsewhere")
    store.folder(1).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=OUTSIDE):
        store.delete_dropped()
    assert (tmp_path / "elsewhere" / "policy.safetensors").exists()
