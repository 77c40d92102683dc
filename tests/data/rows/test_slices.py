from __future__ import annotations

import datasets
import pytest

from tpmm_pl.data.rows.slices import Slice, parse_split
from tpmm_pl.types import InputError


def test_a_split_expression_names_splits_and_rows() -> None:
    assert parse_split(None) == [Slice()]
    assert parse_split("train_prefs") == [Slice("train_prefs")]
    assert parse_split("[:1000]") == [Slice(None, None, "1000")]
    assert parse_split("a[10%:-5] + b[3:]") == [Slice("a", "10%", "-5"), Slice("b", "3", None)]


@pytest.mark.parametrize("text", ["", "train[", "train[1]", "train[:x]", "a+", "a b", "[::2]"])
def test_another_form_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"split is .+; write train, train\[:10%\], train\[100:"):
        parse_split(text)


def test_rows_counted_from_the_start_need_no_total() -> None:
    def count() -> int:
        raise AssertionError

    assert Slice(None, "3", "7").bounds(count) == (3, 7)
    assert Slice().bounds(count) == (0, None)


@pytest.mark.parametrize("rows", [0, 1, 7, 99, 1000])
@pytest.mark.parametrize("text", ["[:10%]", "[33%:67%]", "[-25%:]", "[-3:]", "[:-3]", "[2%:90%]"])
def test_parts_are_those_of_datasets(text: str, rows: int) -> None:
    instruction = datasets.ReadInstruction.from_spec(f"train{text}")
    [absolute] = instruction.to_absolute({"train": rows})
    start, stop = parse_split(text)[0].bounds(lambda: rows)
    assert list(range(rows))[start:stop] == list(range(rows))[absolute.from_ : absolute.to]
