from __future__ import annotations

import json
from math import isnan
from typing import Any

import pytest

from tpmm_pl.data.rows.columns import (
    margin,
    number,
    reference_logps,
    scores,
    token_ids,
    tools,
    weight,
)
from tpmm_pl.data.rows.messages import Cell
from tpmm_pl.types import InputError

IDS = {"prompt_ids": [5, 0], "chosen_ids": [7], "rejected_ids": [8, 9]}
TOOL = {"type": "function", "function": {"name": "add"}}


def test_numbers_are_finite() -> None:
    assert number(2) == 2.0
    assert number(Cell("-1.5e3")) == -1500.0
    for value in (None, True, "2", Cell("x"), Cell("nan"), float("inf"), 10**400, [1]):
        assert number(value) is None


def test_scores_are_numbers_or_nan() -> None:
    assert scores({"score_chosen": 2, "score_rejected": Cell("1")}) == (2.0, 1.0)
    assert all(map(isnan, scores({"score_chosen": "good"})))


def test_defaults_are_those_of_a_pair() -> None:
    assert (margin({}, "d"), weight({}, "d"), token_ids({}, "d"), tools({}, "d")) == (
        0.0,
        1.0,
        None,
        None,
    )
    assert all(map(isnan, reference_logps({}, "d")))


@pytest.mark.parametrize("prefix", ["ref", "reference"])
def test_reference_logps_come_under_both_names(prefix: str) -> None:
    row = {f"{prefix}_chosen_logps": -1, f"{prefix}_rejected_logps": -2.5}
    assert reference_logps(row, "d") == (-1.0, -2.5)


@pytest.mark.parametrize("infix", ["", "input_"])
def test_ids_come_under_both_names(infix: str) -> None:
    row = {name.replace("ids", f"{infix}ids"): ids for name, ids in IDS.items()}
    assert token_ids(row, "d") == ((5, 0), (7,), (8, 9))
    cells = {name: Cell(json.dumps(ids)) for name, ids in row.items()}
    assert token_ids(cells, "d") == ((5, 0), (7,), (8, 9))


def test_tools_are_a_list_or_its_text() -> None:
    filled = {**TOOL, "strict": None}
    for value in ([filled], json.dumps([TOOL]), Cell(json.dumps([filled]))):
        assert tools({"tools": value}, "d") == (TOOL,)
    nothing: Any
    for nothing in (None, [], "", "[]", "null"):
        assert tools({"tools": nothing}, "d") is None


NAN = float("nan")
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (margin, {"margin": NAN}, r"margin is nan; give a finite number, by how much"),
    (margin, {"margin": "1"}, r"margin is '1'; give"),
    (weight, {"weight": -1}, r"weight is -1; give a finite number above 0, by which the pair's"),
    (weight, {"weight": 0}, r"weight is 0; give"),
    (weight, {"weight": NAN}, r"weight is nan; give"),
    (reference_logps, {"ref_chosen_logps": -1.0}, r"is -1.0 and ref_rejected_logps is None; give"),
    (
        reference_logps,
        {"ref_chosen_logps": NAN, "ref_rejected_logps": 1},
        r"ref_chosen_logps is nan and ref_rejected_logps is 1; give two finite numbers, or leave",
    ),
    (token_ids, {**IDS, "prompt_ids": None}, r"no column 'prompt_ids', only \['chosen_ids', 'pro"),
    (token_ids, {**IDS, "chosen_ids": None}, r"no column 'chosen_ids'"),
    (token_ids, {**IDS, "chosen_ids": []}, r"chosen_ids is empty; fill it or delete the row"),
    (token_ids, {**IDS, "chosen_ids": "7"}, r"chosen_ids is a text; give a list of token ids"),
    (token_ids, {**IDS, "rejected_ids": [1, -1]}, r"rejected_ids\[1\] is -1; give whole numbers"),
    (token_ids, {**IDS, "rejected_ids": [1.0]}, r"rejected_ids\[0\] is 1.0; give whole numbers"),
    (token_ids, {**IDS, "rejected_ids": [True]}, r"rejected_ids\[0\] is True; give whole"),
    (tools, {"tools": "{"}, r"tools is '\{'; give a list of JSON schemas, or its text"),
    (tools, {"tools": TOOL}, r"tools is \{.*\}; give a list of JSON schemas"),
    (tools, {"tools": ["add"]}, r"tools is \['add'\]; give"),
    (tools, {"tools": [{"a": b"x"}]}, r"tools is not JSON"),
]


@pytest.mark.parametrize(("read", "row", "sentence"), BAD, ids=[case[2] for case in BAD])
def test_a_bad_column_is_named(read: Any, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=r"^d, line 3: .*" + sentence):
        read(row, "d, line 3")
