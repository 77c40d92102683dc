from __future__ import annotations

import errno
from hashlib import sha256
from pathlib import Path

import pytest

from tpmm_pl.files import (
    DiskError,
    causes,
    disk_fault,
    file_sha256,
    inside,
    refuse_unwritable,
    replacing,
    replacing_folder,
    write_text,
)
from tpmm_pl.types import InputError


def test_text_is_written_whole_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    write_text(path, "again")
    assert path.read_text() == "again"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it, then what no file can hold: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "b.txt"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    write_text(path, "old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert beside.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("size", [0, 5, (1 << 22) + 1])
def test_a_hash_is_that_of_the_whole_file(size: int, tmp_path: Path) -> None:
    content = b"x" * size
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == sha256(content).hexdigest()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "made" / "folder"
    with replacing_folder(out) as beside:
        (beside / "a").write_text("first")

    def fill_half() -> None:
        with replacing_folder(out) as beside:
            (beside / "b").write_text("second")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        fill_half()
    assert [path.name for path in out.iterdir()] == ["a"]
    with replacing_folder(out) as beside:
        (beside / "c").write_text("third")
    assert [path.name for path in out.iterdir()] == ["c"]
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "last.ckpt"
    out.write_text("of one process")
    for number in range(2):
        with replacing_folder(out) as beside:
            (beside / str(number)).write_text("of several")
    assert [path.name for path in tmp_path.rglob("*")] == ["last.ckpt", "1"]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, r"no space left on device, [\d,.]+ MB are free\); make room"),
        (errno.EDQUOT, r"disk quota exceeded, [\d,.]+ MB are free\); make room"),
        (errno.EROFS, r"read-only file system\); allow writing there"),
        (errno.EACCES, r"permission denied\); allow writing there"),
        (errno.EPERM, r"operation not permitted\); allow writing there"),
    ],
)
@pytest.mark.parametrize("said", ["by the system", "by safetensors", "in the cause"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_the_old_file_stays(
    said: str, number: int, way_out: str, tmp_path: Path
) -> None:
    path = tmp_path / "b.txt"
    write_text(path, "old")
    write_text(tmp_path / "folder" / "a", "old")
    failure: Exception = OSError(number, "as the system says it")
    if said == "by safetensors":
        failure = RuntimeError(
            f"Error while serializing: I/O error: some words (os error {number})"
        )
    if said == "in the cause":
        failure, failure.__cause__ = RuntimeError("unexpected pos 576 vs 534"), failure

    def write_half(into: Path) -> None:
        into.write_text("half")
        raise failure

    sentence = rf"cannot be written \({way_out}$"
    with pytest.raises(DiskError, match=rf"^{path} {sentence}"), replacing(path) as beside:
        write_half(beside)
    folder = tmp_path / "folder"
    with (
        pytest.raises(DiskError, match=rf"^{folder} {sentence}"),
        replacing_folder(folder) as beside,
    ):
        write_half(beside / "a")
    assert path.read_text() == (tmp_path / "folder" / "a").read_text() == "old"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b.txt", "folder"]


def test_other_faults_are_none_of_the_disk() -> None:
    assert disk_fault(ValueError("no")) is None
    # of a file that is read
    assert disk_fault(PermissionError(errno.EACCES, "Permission denied", "data.jsonl")) is None
    assert disk_fault(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    later = RuntimeError("behind")
    later.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_fault(later) is not None
    later.__suppress_context__ = True
    assert disk_fault(later) is None
    assert str(disk_fault(OSError(errno.ENOSPC, "full"))) == (
        "a file cannot be written (no space left on device); make room"
    )


def test_an_input_error_inside_a_write_stays_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the rows"), replacing(tmp_path / "b.txt"):
        raise InputError("the rows cannot be read") from PermissionError(errno.EACCES, "denied")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a/.."])
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^'{name}' leads out of {tmp_path}, whose records"):
        inside(tmp_path, name)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "within").symlink_to(root / "a")
    assert inside(root, "within/file") == root / "within" / "file"
    with pytest.raises(InputError, match="'out/file' leads out of"):
        inside(root, "out/file")
    # one that begins with the same letters
    (tmp_path / "root-2").mkdir()
    (root / "near").symlink_to(tmp_path / "root-2")
    with pytest.raises(InputError, match="'near' leads out of"):
        inside(root, "near")


def test_a_folder_to_be_made_is_as_writable_as_its_parent(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run cannot be written \(.*file takes no files\)"):
        refuse_unwritable(tmp_path / "file" / "run")


def test_what_led_to_an_error_is_told_once_also_in_a_ring() -> None:
    first, second, third = ValueError("1"), KeyError("2"), OSError("3")
    third.__cause__, second.__context__ = second, first
    assert [*causes(third)] == [third, second, first]
    first.__context__ = third
    assert [*causes(third)] == [third, second, first]
    second.__suppress_context__ = True
    assert [*causes(third)] == [third, second]
    assert [*causes(third, hidden=True)] == [third, second, first]
