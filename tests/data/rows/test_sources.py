from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from tpmm_pl.data.rows.sources import DataSource, as_sources, fingerprint, located_rows
from tpmm_pl.types import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"a": i}) for i in range(10)))
    return path


def values(source: DataSource) -> list[int]:
    return [row["a"] for _, row in located_rows(source)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, list(range(10))),
        ("train", list(range(10))),
        ("[:3]", [0, 1, 2]),
        ("train[7:]", [7, 8, 9]),
        ("[:20%]", [0, 1]),
        ("[-1:]", [9]),
        ("[:1]+[8:9]", [0, 8]),
        ("[5:2]", []),
    ],
)
def test_a_part_of_a_file_is_read(file: Path, split: str | None, expected: list[int]) -> None:
    assert values(DataSource(str(file), split=split)) == expected


def test_a_row_keeps_its_line_in_a_part(file: Path) -> None:
    [(where, _)] = located_rows(DataSource(str(file), split="[7:8]"))
    assert where == f"{file}, line 8"


def test_a_file_has_no_splits(file: Path) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl is a file, it has no split 'test'; name rows"):
        values(DataSource(str(file), split="test[:3]"))


def test_bad_rows_are_refused_and_the_others_follow(file: Path) -> None:
    file.write_text('{"a": 0}\n{\n{"a": 2}')
    with pytest.raises(InputError, match=r"line 2: not JSON"):
        values(DataSource(str(file)))
    refused: list[InputError] = []
    assert [row for _, row in located_rows(DataSource(str(file)), refused.append)] == [
        {"a": 0},
        {"a": 2},
    ]
    assert [str(error).partition(":")[0] for error in refused] == [f"{file}, line 2"]


def test_a_bad_row_outside_of_the_part_is_nobodys_business(file: Path) -> None:
    file.write_text('{"a": 0}\n{\n{"a": 2}')
    assert values(DataSource(str(file), split="[:1]+[2:]")) == [0, 2]


def test_columns_are_renamed(file: Path) -> None:
    source = DataSource(str(file), split="[:1]", mapping={"prompt": "a"})
    assert [row for _, row in located_rows(source)] == [{"prompt": 0}]
    with pytest.raises(
        InputError, match=r"line 1: no column 'b', only \['a'\]; choose another map"
    ):
        list(located_rows(replace(source, mapping={"prompt": "b"})))


def test_the_same_rows_come_from_a_folder_and_a_file(file: Path, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"a": i} for i in range(10)]).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        folder = DataSource(str(tmp_path / "saved"), split="[:3]", streaming=streaming)
        assert values(folder) == values(DataSource(str(file), split="[:3]"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Anthropic/hh-rlhf", "Anthropic/hh-rlhf"),
        ("imdb", "imdb"),
        ("data/none.jsonl", None),
        ("/absolute/path", None),
        ("a/b/c", None),
    ],
)
def test_what_is_no_file_may_be_on_the_hub(path: str, expected: str | None) -> None:
    assert DataSource(path).hub_id == expected


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path / "a" / "b"):
        with pytest.raises(InputError, match=rf"no file {path}; check the path"):
            values(DataSource(str(path)))
        with pytest.raises(InputError, match=rf"no file {path}; check the path"):
            fingerprint(DataSource(str(path)))
    with pytest.raises(InputError, match=rf"{tmp_path} is a folder, but datasets saved nothing in"):
        values(DataSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pairing": "adjacant"}, r"unknown pairing 'adjacant'; did you mean adjacent"),
        ({"mapping": "nectra"}, r"unknown mapping 'nectra'; did you mean nectar"),
        ({"mapping": {"promt": "a"}}, r"unknown field of a mapping 'promt'; did you mean prompt"),
        ({"weight": 0.0}, r"a source has weight 0\.0"),
        ({"split": "train[1"}, r"split is 'train\[1'; write train"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        DataSource("d.jsonl", **settings)


def test_one_source_or_several_become_a_list() -> None:
    a, b = DataSource("a.jsonl"), DataSource("b.jsonl")
    assert as_sources("a.jsonl") == as_sources(Path("a.jsonl")) == as_sources(a) == [a]
    assert as_sources(["a.jsonl", b]) == [a, b]
    with pytest.raises(InputError, match=r"no source of data is given"):
        as_sources([])
    with pytest.raises(InputError, match=r"weights \[1\.0, None\]; give every source a weight"):
        as_sources([replace(a, weight=1.0), b])


def test_the_fingerprint_covers_what_changes_rows_and_nothing_else(
    file: Path, tmp_path: Path
) -> None:
    source = DataSource(str(file))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(file.read_bytes())
    same = [source, DataSource(str(moved)), replace(source, streaming=True, weight=2.0)]
    assert len({fingerprint(one) for one in same}) == 1
    others = [
        replace(source, split="[:5]"),
        replace(source, pairing="all"),
        replace(source, mapping="shp"),
        replace(source, mapping={"prompt": "a"}),
    ]
    assert len({fingerprint(one) for one in [source, *others]}) == 5
    before = fingerprint(source)
    file.write_text(file.read_text().replace("9", "8"))
    assert fingerprint(source) != before


def test_the_label_names_what_is_read() -> None:
    assert DataSource("a/b", name="c", split="train[:5]").label == "a/b c train[:5]"
    assert DataSource("d.jsonl").label == "d.jsonl"
