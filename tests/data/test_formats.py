from __future__ import annotations

import gzip
import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from tpmm_pl.data.formats import (
    RawPair,
    read_preferences,
    read_prompts,
    read_rows,
    to_preference,
)
from tpmm_pl.types import InputError

REAL = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval_pairs"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("no")]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "é\u2028"}, {"b": [1]}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n", "\r\n\n  \n"), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(lines, "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.json", "b.json", "a.jsonl.gz"):
        assert read_rows(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": ', r"d\.jsonl, line 3: not JSON \(.+ at column \d+\); one object a line"),
        ("[1, 2]", r"d\.jsonl, line 3: a list where an object belongs; a line is \{\"prompt\""),
        ('"text"', r"d\.jsonl, line 3: a text where an object belongs"),
    ],
)
def test_a_broken_line_is_named_with_blank_lines_counted(
    tmp_path: Path, line: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        read_rows(write(tmp_path / "d.jsonl", PLAIN, "", line))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*none\.jsonl; check the path"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "d.csv").touch()
    with pytest.raises(InputError, match=r"d\.csv is of no known kind; give \.jsonl"):
        read_rows(tmp_path / "d.csv")
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"d\.jsonl cannot be read \(.+\); save it as UTF-8"):
        read_rows(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"{}" * 50)[:-12])
    with pytest.raises(InputError, match=r"d\.jsonl\.gz cannot be read"):
        read_rows(tmp_path / "d.jsonl.gz")


def test_plain_texts_are_taken_as_they_are() -> None:
    pair = to_preference({**PLAIN, "score_chosen": 2, "source": "x"}, "here")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("2 + 2 = ", "4", "5")
    assert pair.score_chosen == 2.0
    assert isnan(pair.score_rejected)
    assert pair.where == "here"


def test_conversations_keep_role_and_content() -> None:
    row = {**CHAT, "prompt": [{**user("hi"), "id": 7}]}
    pair = to_preference(row, "here")
    assert pair.prompt == (user("hi"),)
    assert pair.chosen == (assistant("hello"),)


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": "hi"}])
def test_turns_that_both_answers_begin_with_are_the_prompt(prompt: dict[str, Any]) -> None:
    shared = [user("hi"), assistant("yes?"), user("2 + 2?")]
    row = {**prompt, "chosen": [*shared, assistant("4")], "rejected": [*shared, assistant("5")]}
    pair = to_preference(row, "here")
    assert pair.prompt == tuple(shared)
    assert pair.chosen == (assistant("4"),)
    assert pair.rejected == (assistant("5"),)


BAD: list[tuple[dict[str, Any], str]] = [
    ({**PLAIN, "chosen": None}, r"no field 'chosen', only \['chosen', 'prompt', .*; a line is"),
    ({"chosen": "a", "rejected": "b"}, r"do not match \(prompt missing, chosen a text, rej"),
    ({**PLAIN, "rejected": " "}, r"rejected is empty; fill it or delete the row"),
    ({**PLAIN, "prompt": 3}, r"prompt is a int; a line is"),
    ({**PLAIN, "chosen": CHAT["chosen"]}, r"do not match \(prompt a text, chosen messages, rej"),
    ({**CHAT, "chosen": "hello"}, r"do not match \(prompt messages, chosen a text"),
    ({**CHAT, "chosen": []}, r"chosen is empty"),
    ({**CHAT, "chosen": ["hello"]}, r"chosen\[0\] is a text; a turn has 'role' and 'content'"),
    ({**CHAT, "chosen": [{"role": "assistant"}]}, r"chosen\[0\]: content is missing; it must"),
    ({**CHAT, "chosen": [assistant("")]}, r"chosen\[0\]: content is empty; fill it or delete"),
    ({**CHAT, "chosen": [user("x")]}, r"chosen begins with the role 'user', not 'assistant'; put"),
    ({**CHAT, "prompt": [assistant("x")]}, r"prompt ends with the assistant; end it with the"),
    ({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, r"do not begin with the same turns"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_bad_row_is_named_with_file_line_and_field(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path / "d.jsonl", PLAIN, "", row)
    with pytest.raises(InputError, match=r"d\.jsonl, line 3: .*" + sentence):
        read_preferences(path)


def test_a_bad_turn_names_the_line_too(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**CHAT, "chosen": [{"role": "assistant", "content": 1}]})
    with pytest.raises(InputError, match=r"line 1: chosen\[0\]: content is a int; it must be a"):
        read_preferences(path)


def test_identical_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    turns = [user("hi"), assistant("same")]
    same = [{**PLAIN, "rejected": "4"}, {"chosen": turns, "rejected": turns}]
    pairs, dropped = read_preferences(write(tmp_path / "d.jsonl", *same, PLAIN, CHAT))
    assert [pair.where[-6:] for pair in pairs] == ["line 3", "line 4"]
    assert dropped == {"chosen and rejected identical": 2}


def test_a_file_without_a_usable_pair_is_refused(tmp_path: Path) -> None:
    same = {**PLAIN, "rejected": "4"}
    with pytest.raises(InputError, match=r"holds no usable pair \(dropped: \{'chosen and .*: 1\}"):
        read_preferences(write(tmp_path / "d.jsonl", same))
    with pytest.raises(InputError, match=r"holds no usable pair \(dropped: \{\}\); a line is"):
        read_preferences(write(tmp_path / "e.jsonl", ""))


def test_prompts_are_texts_or_messages_without_their_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "text"},
        {"prompt": [user("a")]},
        {"messages": [user("b"), assistant("c"), user("d"), assistant("e")]},
        CHAT,
    ]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert [row.prompt for row in prompts] == [
        "text",
        (user("a"),),
        (user("b"), assistant("c"), user("d")),
        (user("hi"),),
    ]
    assert prompts[2].where.endswith("p.jsonl, line 3")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, r"line 1: no field 'messages', only \['text'\]"),
        ({"messages": "x"}, r"line 1: messages is a text; name a plain text 'prompt'"),
        ({"messages": [assistant("x")]}, r"line 1: nothing is left to answer; add the user's"),
        ({"prompt": [user("x"), assistant("y")]}, r"line 1: prompt ends with the assistant"),
        ("", r"p\.jsonl holds no prompt; a line is"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, row: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_prompts(write(tmp_path / "p.jsonl", row))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real pairs beside the repository")
def test_real_pairs_are_read() -> None:
    pairs, dropped = read_preferences(REAL / "eval_in_domain.jsonl")
    assert len(pairs) + dropped.total() == 533
    assert all(isinstance(pair, RawPair) and isinstance(pair.prompt, tuple) for pair in pairs)


def test_a_margin_is_read_and_is_0_where_there_is_none() -> None:
    assert to_preference(PLAIN, "here").margin == 0.0
    assert to_preference({**PLAIN, "margin": 2}, "here").margin == 2.0
    assert to_preference({**CHAT, "margin": -0.5}, "here").margin == -0.5


@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), [1]])
def test_a_margin_that_is_no_finite_number_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl, line 3: margin is .+; give a finite number"):
        to_preference({**PLAIN, "margin": value}, "d.jsonl, line 3")
