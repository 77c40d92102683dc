from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tpmm_pl.files import DiskError, file_sha256
from tpmm_pl.trajectory import Record, SnapshotFile, TrajectoryStore
from tpmm_pl.types import InputError, Recipe

MERGE = Recipe("learned", (0, 1), ((0.25, 0.75),))


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value), "steps": torch.tensor([7])}


def store_of_two(root: Path) -> TrajectoryStore:
    store = TrajectoryStore(root)
    store.describe_model({"name": "tiny", "lora": None})
    store.add_snapshot(0, state(0.0))
    store.update(0, recipe=Recipe("last", (0,)), pairs="round_000/pairs.parquet")
    store.add_snapshot(1, state(1.0))
    store.update(1, recipe=MERGE, ship={"merged": MERGE}, seconds={"train": 1.5})
    return store


def private_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    back = TrajectoryStore(tmp_path)
    assert back.rounds == store.rounds
    assert back.model == {"name": "tiny", "lora": None}
    record = back.record(1)
    assert record.recipe == MERGE
    assert record.ship == {"merged": MERGE}
    assert record.snapshot == "round_001/policy.safetensors"
    assert record.sha256 == file_sha256(tmp_path / "round_001" / "policy.safetensors")
    assert back.record(0).pairs == "round_000/pairs.parquet"


def test_snapshots_come_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    written = {
        "wide": torch.randn(4, 5, generator=generator),
        "turned": torch.randn(5, 4, generator=generator).T,
        "half": torch.randn(3, generator=generator).bfloat16(),
        "zero": torch.tensor([-0.0]),
        "steps": torch.tensor([1 << 40]),
    }
    store = TrajectoryStore(tmp_path)
    store.add_snapshot(0, written)
    for tensors in (store.source(0), load_file(store.folder(0) / "policy.safetensors")):
        assert set(tensors) == set(written)
        for name, tensor in written.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    assert store.source(0)["zero"].signbit()
    assert len(store.source(0)) == 5


def test_nothing_is_known_of_a_round_before_its_stages(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "new")
    assert store.rounds == []
    assert store.record(3) == Record(3)
    assert not (tmp_path / "new").exists()


def test_measurements_are_added_and_stages_replaced(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    store.update(1, seconds={"fuse": 2.0}, metrics={"a": 1.0}, notes={"fit": "moved"}, fuse="f")
    record = store.update(1, metrics={"b": 2.0}, fuse="g")
    assert record.seconds == {"train": 1.5, "fuse": 2.0}
    assert record.metrics == {"a": 1.0, "b": 2.0}
    assert record.notes == {"fit": "moved"}
    assert record.fuse == "g"
    assert TrajectoryStore(tmp_path).record(1) == record


def test_rounds_are_listed_oldest_first(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    for index in (2, 0, 1):
        store.update(index)
    assert [record.round for record in store.rounds] == [0, 1, 2]
    assert [record.round for record in TrajectoryStore(tmp_path).rounds] == [0, 1, 2]


def test_later_rounds_are_forgotten_for_good(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    store.source(1)
    store.forget_after(0)
    for one in (store, TrajectoryStore(tmp_path)):
        assert [record.round for record in one.rounds] == [0]
        with pytest.raises(InputError, match=r"no snapshot of round 1 in .*; there are \[0\]"):
            one.source(1)
    store.forget_after(5)
    assert [record.round for record in store.rounds] == [0]


def test_a_snapshot_made_again_replaces_the_one_in_use(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    before = store.source(1)
    old = store.record(1).sha256
    store.add_snapshot(1, state(5.0))
    assert store.source(1)["w"].unique().tolist() == [5.0]
    # whoever still reads the old file reads the old file
    assert before["w"].unique().tolist() == [1.0]
    assert store.record(1).sha256 != old
    assert TrajectoryStore(tmp_path).record(1) == store.record(1)


def test_a_recipe_reads_its_snapshots_in_its_own_order(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    values = [s["w"][0, 0].item() for s in store.sources(Recipe("x", (1, 0), ((0.5, 0.5),)))]
    assert values == [1.0, 0.0]
    assert store.sources(MERGE)[0] is store.source(0)


def test_paths_are_relative_so_that_a_run_can_be_moved(tmp_path: Path) -> None:
    store_of_two(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    store = TrajectoryStore(tmp_path / "new")
    assert store.source(1)["w"][0, 0] == 1
    assert store.path(store.relative(store.folder(1))) == tmp_path / "new" / "round_001"


def test_a_changed_coefficient_is_noticed(tmp_path: Path) -> None:
    manifest = store_of_two(tmp_path).manifest
    text = manifest.read_text()
    assert text.count("0.75") == 2  # the reference and what is shipped
    for part in (text.replace("0.75", "0.751", 1), "0.751".join(text.rsplit("0.75", 1))):
        manifest.write_text(part)
        with pytest.raises(InputError, match=r"manifest.json cannot be read .*another hash.*; res"):
            TrajectoryStore(tmp_path)


def test_a_changed_snapshot_hash_is_noticed_by_the_recipes_that_use_it(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    digest = store.record(0).sha256
    assert digest is not None
    store.manifest.write_text(store.manifest.read_text().replace(digest, "0" * 64))
    with pytest.raises(InputError, match="another hash"):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"rounds": []}',
        lambda text: text.replace('"rounds"', '"turns"'),
        lambda text: text.replace('"snapshot"', '"snap"'),
        lambda text: text.replace('"recipe"', '"dish"'),
        lambda text: '{"model": {}, "rounds": [1]}',
        lambda text: text.replace('"version": 1', '"version": 99'),
    ],
)
def test_a_broken_manifest_is_one_sentence(tmp_path: Path, damage: Callable[[str], str]) -> None:
    manifest = store_of_two(tmp_path).manifest
    manifest.write_text(damage(manifest.read_text()))
    sentence = r"manifest\.json .*; restore it or start over with --overwrite$"
    with pytest.raises(InputError, match=sentence):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_snapshot_is_one_sentence(tmp_path: Path, kept: int) -> None:
    store = store_of_two(tmp_path)
    path = store.folder(1) / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    sentence = (
        r"the snapshot .*policy\.safetensors cannot be read .*; restore it or start over with"
    )
    with pytest.raises(InputError, match=sentence):
        store.source(1)


def test_a_missing_snapshot_is_one_sentence(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    (store.folder(1) / "policy.safetensors").unlink()
    with pytest.raises(InputError, match=r"the snapshot .* cannot be read"):
        store.source(1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_sources_cost_no_private_memory(tmp_path: Path) -> None:
    size = 64 << 20
    store = TrajectoryStore(tmp_path)
    store.add_snapshot(0, {"a": torch.ones(size // 8), "b": torch.ones(size // 8)})
    before = private_memory()
    source = store.source(0)
    assert sum(float(source[name].sum()) for name in source) == size // 4
    assert private_memory() - before < size // 8
    copies = {name: tensor.clone() for name, tensor in source.items()}
    assert private_memory() - before > size // 2
    del copies


def test_a_source_is_read_once(tmp_path: Path) -> None:
    store = store_of_two(tmp_path)
    source = store.source(0)
    assert store.source(0) is source
    assert source["w"].data_ptr() == source["w"].data_ptr()


def test_a_write_that_fails_leaves_the_records_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of_two(tmp_path)
    before = store.manifest.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tpmm_pl.tensor_files._whole", full)
    with pytest.raises(DiskError, match=r"policy\.safetensors cannot be written \(no space left"):
        store.add_snapshot(2, state(2.0))
    assert store.manifest.read_text() == before
    assert [path.name for path in store.folder(2).iterdir()] == []
    with pytest.raises(InputError, match="cannot be read"):
        SnapshotFile(store.folder(2) / "policy.safetensors")
