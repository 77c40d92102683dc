from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpmm_pl.commands.leftovers import remove_leftovers

DEAD, LIVING = 2**22 + 1, os.getppid()
"""No process has a number that large: Linux counts to 2**22."""


def test_what_a_dead_process_left_goes_and_all_else_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    stay = ["last.ckpt", f".last.ckpt.{LIVING}", ".hidden", ".config", f"last.ckpt.{DEAD}"]
    go = [f".last.ckpt.{DEAD}", f".last.ckpt.{os.getpid()}"]
    for name in (*stay, *go):
        (folder / name).write_bytes(b"half")
    beside = tmp_path / f".best.{DEAD}"
    (beside / "deep").mkdir(parents=True)
    removed = remove_leftovers(tmp_path)
    assert sorted(removed) == sorted([beside, *(folder / name for name in go)])
    assert sorted(path.name for path in folder.iterdir()) == sorted(stay)
    assert not beside.exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_taken_out_of_its_place_is_put_back_unless_replaced(
    tmp_path: Path, replaced: bool
) -> None:
    old, place = tmp_path / f".best.{DEAD}.old", tmp_path / "best"
    old.mkdir()
    (old / "model").write_text("old")
    if replaced:
        place.mkdir()
        (place / "model").write_text("new")
    remove_leftovers(tmp_path)
    assert (place / "model").read_text() == ("new" if replaced else "old")
    assert not old.exists()


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none") == []


@pytest.mark.parametrize("of_jobs", ["trajectory/round_001/shards", ".generation"])
def test_what_jobs_of_their_own_write_is_theirs(of_jobs: str, tmp_path: Path) -> None:
    file = tmp_path / of_jobs / f".pairs_1_of_2.parquet.{DEAD}"
    old = tmp_path / of_jobs / f".001_1.{DEAD}.old"
    old.mkdir(parents=True)
    file.write_bytes(b"half")
    assert remove_leftovers(tmp_path) == []
    assert file.exists()
    assert old.exists()
