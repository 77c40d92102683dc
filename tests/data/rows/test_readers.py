from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpmm_pl.data.rows.messages import Cell
from tpmm_pl.data.rows.readers import read_file
from tpmm_pl.types import InputError

ROWS: list[dict[str, Any]] = [{"a": "é\u2028", "b": 'x, "y"\nz'}, {"a": "2", "b": None}]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def errors(path: Path) -> list[str]:
    return [str(row) for _, row in read_file(path) if isinstance(row, InputError)]


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    files: dict[str, bytes | str] = {
        "a.jsonl": "\ufeff" + lines.replace("\n", "\r\n\n  \n"),
        "a.json": "\ufeff \n" + json.dumps(ROWS, indent=1),
        "b.json": lines,
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.csv": '\ufeffa,b\r\né\u2028,"x, ""y""\nz"\r\n\r\n2,\r\n',
    }
    paths = [write(tmp_path / name, content) for name, content in files.items()]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*paths, tmp_path / "a.parquet"]:
        assert [row for _, row in read_file(path)] == ROWS, path.name


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    places = {
        "a.jsonl": ("{}\n\n{}", ["line 1", "line 3"]),
        "a.json": ("[{}, {}]", ["item 1", "item 2"]),
        "a.csv": ('a\n"x\ny"\n\nz\n', ["line 2", "line 5"]),
    }
    for name, (content, expected) in places.items():
        path = write(tmp_path / name, content)
        assert [where for where, _ in read_file(path)] == [f"{path}, {at}" for at in expected]
    pq.write_table(pa.table({"a": [1] * 300}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet"))[299][0].endswith("a.parquet, row 300")


def test_cells_are_texts_that_may_mean_more(tmp_path: Path) -> None:
    [(_, row)] = read_file(write(tmp_path / "a.csv", "a,b\n4,\n"))
    assert row == {"a": "4", "b": None}
    assert isinstance(row, dict)
    assert isinstance(row["a"], Cell)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"a": ', r"d\.jsonl, line 3: not JSON \(.+ at column \d+\); one object a line, or one"),
        ("[1, 2]", r"d\.jsonl, line 3: a list where an object belongs; a line is \{\"prompt\""),
        ('"text"', r"d\.jsonl, line 3: a text where an object belongs"),
        ("[" * 100_000, r"d\.jsonl, line 3: not JSON that can be read \(maximum recursion"),
        ("1" * 5_000, r"d\.jsonl, line 3: not JSON that can be read \(Exceeds the limit"),
        ('{"a": "\xff"}', r"d\.jsonl, line 3: cannot be read \('utf-8' codec .+\); save it as U"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: str, sentence: str
) -> None:
    path = write(tmp_path / "d.jsonl", b'{"a": 1}\n\n' + line.encode("latin-1") + b'\n{"a": 2}')
    (_, first), (_, second), (_, third) = read_file(path)
    assert (first, third) == ({"a": 1}, {"a": 2})
    with pytest.raises(InputError, match=sentence):
        raise second if isinstance(second, InputError) else AssertionError


def test_a_broken_row_of_a_table_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", b'a,b\n1,2\n1\n\xff,2\n"x"y,2\n3,4\n"cut')
    assert len([row for _, row in read_file(path) if isinstance(row, dict)]) == 2
    few, undecodable, quotes, cut = errors(path)
    assert few.endswith(
        "d.csv, line 3: 1 cells, but the header has 2; quote cells that hold commas or line ends"
    )
    assert "d.csv, line 4: cannot be read ('utf-8' codec" in undecodable
    assert "d.csv, line 5: not CSV (',' expected after '\"'); quote the cell" in quotes
    assert "d.csv, line 7: not CSV (unexpected end of data)" in cut

    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": texts}), tmp_path / "d.parquet")
    assert [row for _, row in read_file(tmp_path / "d.parquet")][::2] == [{"a": "a"}, {"a": "c"}]
    [undecodable] = errors(tmp_path / "d.parquet")
    assert "d.parquet, row 2: cannot be read ('utf-8' codec" in undecodable


@pytest.mark.parametrize("header", ["a,a", "a,", ","])
def test_columns_without_names_of_their_own_are_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(InputError, match=r"d\.csv, line 1: the header is .+; give each column a n"):
        list(read_file(write(tmp_path / "d.csv", f"{header}\n1,2")))


def test_a_broken_list_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"d\.json, line 3: not JSON \(.+ at column \d+\)"):
        list(read_file(write(tmp_path / "d.json", '[{"a": 1},\n {"a": 2},\n {"a"')))


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    zipped = gzip.compress(b'{"a": 1}\n' * 50)
    for name, content in (("d.parquet", half), ("d.jsonl.gz", zipped[:-12]), ("e.jsonl.gz", b"{}")):
        path = write(tmp_path / name, content)
        with pytest.raises(
            InputError, match=rf"{name} cannot be read \(.+\); it may be cut off: s"
        ):
            list(read_file(path))


def test_a_column_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"aabb": [1]}), path, store_schema=False)
    write(path, path.read_bytes().replace(b"aabb", b"aa\xffb"))
    with pytest.raises(InputError, match=r"d\.parquet cannot be read \('utf-8' codec .+\); it may"):
        list(read_file(path))


def test_files_that_cannot_be_read_at_all_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*none\.jsonl; check the path"):
        list(read_file(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"d\.txt is of no known kind; give \.jsonl, .*\.parquet,"):
        list(read_file(write(tmp_path / "d.txt", "")))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.json", "d.csv"):
        assert list(read_file(write(tmp_path / name, ""))) == []
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "d.parquet")
    assert list(read_file(tmp_path / "d.parquet")) == []


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"a": 1}\n' + "{}\n" * 200_000)
    rows = read_file(path)
    assert next(rows)[1] == {"a": 1}
    # the rest is not there any more: it had not been read
    write(path, "")
    assert sum(1 for _ in rows) < 100_000
