from __future__ import annotations

import struct
from dataclasses import fields
from math import nan
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpmm_pl.data.pairs import read_pairs, write_pairs
from tpmm_pl.data.table import SCHEMA
from tpmm_pl.files import file_sha256
from tpmm_pl.types import InputError, Pair


def pair(**changes: object) -> Pair:
    values: dict[str, object] = {
        "prompt_id": "p",
        "prompt": "Grüße\n",
        "chosen": "好",
        "rejected": "",
        "prompt_ids": (3, 4),
        "chosen_ids": (5, 49_151),
        "rejected_ids": (1,),
    }
    return Pair(**(values | changes))  # type: ignore[arg-type]


def test_pairs_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    awkward = [0.1 + 0.2, -0.0, 5e-324, 1e308, float("inf")]
    pairs = [
        pair(prompt_id=str(index), score_chosen=value, ref_chosen_logps=-value, flipped=index == 1)
        for index, value in enumerate(awkward)
    ]
    digest = write_pairs(tmp_path / "pairs.parquet", pairs)
    assert digest == file_sha256(tmp_path / "pairs.parquet")
    back = read_pairs(tmp_path / "pairs.parquet")
    assert [repr(one) for one in back] == [repr(one) for one in pairs]
    assert [struct.pack("d", one.score_chosen) for one in back] == [
        struct.pack("d", value) for value in awkward
    ]


def test_not_a_number_and_empty_tokens_survive(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [pair(prompt_ids=(), weight=nan)])
    assert repr(list(read_pairs(tmp_path / "p.parquet"))) == repr([pair(prompt_ids=(), weight=nan)])


def test_a_file_from_before_there_were_margins_has_margins_of_0(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [pair(margin=0.5)])
    assert read_pairs(tmp_path / "p.parquet")[0].margin == 0.5
    table = pq.read_table(tmp_path / "p.parquet").drop_columns(["margin"])
    pq.write_table(table, tmp_path / "q.parquet")
    assert repr(list(read_pairs(tmp_path / "q.parquet"))) == repr([pair()])


def test_no_pairs_are_a_file_too(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [])
    assert list(read_pairs(tmp_path / "p.parquet")) == []


def test_columns_are_the_fields_of_a_pair_in_order() -> None:
    assert SCHEMA.names == [field.name for field in fields(Pair)]


def test_a_path_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    write_pairs(tmp_path / "seed=1" / "p.parquet", [pair()])
    assert len(read_pairs(tmp_path / "seed=1" / "p.parquet")) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_pairs(path, [pair()])
    with pytest.raises(pa.ArrowException):
        write_pairs(path, [pair(prompt_ids=("not a token",))])
    assert len(read_pairs(path)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.parquet"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pairs file at .*none\.parquet; check the path"):
        read_pairs(tmp_path / "none.parquet")


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_pairs(path, [pair()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"p\.parquet cannot be read as parquet .*make it again"):
        read_pairs(path)


def test_a_foreign_file_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"missing \['prompt_id',.*unknown \['completion'\]; give"):
        read_pairs(tmp_path / "p.parquet")


def test_columns_of_another_type_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [pair()])
    table = pq.read_table(tmp_path / "p.parquet")
    place = table.column_names.index("weight")
    table = table.set_column(place, "weight", pa.array(["heavy"]))
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"q\.parquet is not a file of pairs: .*heavy.*make it"):
        read_pairs(tmp_path / "q.parquet")


def test_missing_values_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [pair()])
    table = pq.read_table(tmp_path / "p.parquet")
    place = table.column_names.index("chosen")
    table = table.set_column(place, "chosen", pa.array([None], type=pa.string()))
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"missing values in \['chosen'\]"):
        read_pairs(tmp_path / "q.parquet")
