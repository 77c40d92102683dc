from __future__ import annotations

import json
from typing import Any

import pytest

from tpmm_pl.data.rows.messages import Cell, content, with_system, without_nulls
from tpmm_pl.types import InputError

FUNCTION: dict[str, Any] = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": FUNCTION}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def read(value: Any) -> Any:
    return content({"prompt": value}, "prompt", "d, line 3")


def test_a_text_stays_as_it_is() -> None:
    assert read(" 2 + 2 =\n") == " 2 + 2 =\n"


def test_turns_keep_what_templates_know() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "", "name": "add", "tool_call_id": "7"}
    given = [{**user("hi"), "id": 7, "name": None}, called, answered]
    assert read(given) == (user("hi"), called, answered)


def test_empty_entries_that_tables_fill_in_are_left_out() -> None:
    filled = {"type": "function", "function": {**FUNCTION, "x": None}, "id": None}
    turn = {"role": "assistant", "content": "", "tool_calls": [filled], "tool_call_id": None}
    assert read([turn]) == ({"role": "assistant", "content": "", "tool_calls": [CALL]},)
    assert without_nulls([{"a": None, "b": [None, 1]}]) == [{"b": [None, 1]}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": " b"}]
    assert read([{"role": "user", "content": parts}]) == (user("a b"),)


def test_sharegpt_turns_are_turns() -> None:
    given = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    roles = [(turn["role"], turn["content"]) for turn in read(given)]
    assert roles == [("system", "s"), ("user", "hi"), ("assistant", "hello")]


def test_a_single_turn_needs_no_list() -> None:
    assert read(user("hi")) == (user("hi"),)


def test_a_cell_may_hold_turns_and_is_a_text_otherwise() -> None:
    assert read(Cell(json.dumps([user("hi")]))) == (user("hi"),)
    for text in ("[1, 2]", "[not json", "{}", "4", "[" * 10_000):
        assert read(Cell(text)) == text
        assert type(read(Cell(text))) is str
    assert read('[{"role": "user"}]') == '[{"role": "user"}]'


BAD: list[tuple[Any, str]] = [
    (None, r"no field 'prompt', only \['prompt'\]; a line is"),
    (3, r"prompt is a number; a line is"),
    ("  ", r"prompt is empty; fill it or delete the row"),
    ([], r"prompt is empty"),
    ("a\ud800", r"prompt holds half a character at position 1 \(a lone surrogate\); save it"),
    (["a"], r"prompt\[0\] is a text; a turn has 'role' and 'content'"),
    ([{"content": "a"}], r"prompt\[0\]: role is missing; it must be a text"),
    ([{"role": 1, "content": "a"}], r"prompt\[0\]: role is a number; it must be a text"),
    ([{"role": "user"}], r"prompt\[0\]: content is missing; it must be a text"),
    ([{"role": "user", "content": None, "tool_calls": []}], r"content is missing"),
    ([user(" ")], r"prompt\[0\]: content is empty; fill it or delete"),
    ([user("\udcff")], r"prompt\[0\]: content holds half a character"),
    ([{**user("a"), "name": 1}], r"prompt\[0\]: name is a number; it must be a text"),
    ([{**user("a"), "tool_calls": "x"}], r"prompt\[0\]: tool_calls is a text; give a list of ob"),
    ([{**user("a"), "tool_calls": [1]}], r"tool_calls is a list; give a list of objects"),
    ([{**user("a"), "tool_calls": [{"x": b"1"}]}], r"tool_calls is not JSON \(Object of type byt"),
    ([{**user("a"), "tool_calls": [{"x": "\udcff"}]}], r"tool_calls holds half a character"),
    ([{"role": "user", "content": ["a"]}], r"prompt\[0\]: content\[0\] is a text; a part is"),
    (
        [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
        r"content\[0\] is of type 'image', and only text is trained on; delete the row",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text is missing; it must"),
    ([{"from": "bot", "value": "x"}], r"prompt\[0\]: from is 'bot'; it is one of human, user, gpt"),
    ([{"from": "gpt"}], r"prompt\[0\]: content is missing"),
]


@pytest.mark.parametrize(("value", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_what_is_no_content_is_named(value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=r"^d, line 3: .*" + sentence):
        read(value)


def test_the_system_column_is_the_first_turn() -> None:
    turn = {"role": "system", "content": "be kind"}
    assert with_system((user("hi"),), {"system": "be kind"}, "d") == (turn, user("hi"))
    assert with_system((turn, user("hi")), {"system": "be kind"}, "d") == (turn, user("hi"))
    for nothing in ({}, {"system": None}, {"system": " "}):
        assert with_system((user("hi"),), nothing, "d") == (user("hi"),)
        assert with_system("hi", nothing, "d") == "hi"


def test_a_system_column_that_finds_no_place_is_named() -> None:
    with pytest.raises(InputError, match=r"d: plain text has no system turn, but there is a colu"):
        with_system("hi", {"system": "be kind"}, "d")
    with pytest.raises(InputError, match=r"d: a column 'system' and another system turn; keep"):
        with_system(({"role": "system", "content": "a"},), {"system": "b"}, "d")
    with pytest.raises(InputError, match=r"d: system is a number; give a text"):
        with_system((user("hi"),), {"system": 1}, "d")
