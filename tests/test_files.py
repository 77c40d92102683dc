from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from tpmm_pl.files import file_sha256, replacing, replacing_folder, write_text


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
